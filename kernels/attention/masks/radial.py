"""Attention that thins out with the distance in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.errors import require_positive
from diffdistill.kernels.attention.layout import count
from diffdistill.kernels.attention.masks.static import StaticMask, check_block
from diffdistill.kernels.ordering import Grid

DENSE = 1 / 3  # a column of a block counts where more of it is on
SHARE = 0.6  # of a block's columns that have anything on: where more count, the block is on


@dataclass(frozen=True)
class Radial(StaticMask):
    """Bands around the same place in other frames, half as wide at twice the distance in time (2506.19852).

    For tokens d frames apart, with n tokens per frame and w = 2^bits(n) / 2^bits(d): the whole frame for d <= 1, beyond
    places |a - a'| <= max(block, decay * w), and where w < block only every floor(block / w)-th frame.
    A block is on where more than 0.6 of its columns that hold any such pair are more than 1/3 full of them, as in the
    paper's release: narrow slivers are dropped, corners are filled.

    decay: of the bands' width, > 0 (the paper: 0.5 to 1).  block: 64 or 128.  sink: all attend the first frame too.
    O(S log S) blocks in the video's length.  Raises UserError for other values.
    """

    decay: float = 1.0
    block: int = 128
    sink: bool = False

    def __post_init__(self) -> None:
        require_positive(decay=self.decay)
        check_block(self.block)

    def reach(self, grid: Grid) -> Tensor:
        """int32 [frames]: largest |a - a'| that is attended at that distance in time, -1 for none."""
        n = grid.height * grid.width
        found = []
        for d in range(grid.frames):
            width = 2.0 ** (n.bit_length() - d.bit_length())
            kept = width >= self.block or d % int(self.block / width) == 0
            band = int(max(self.block, self.decay * width)) if kept else -1
            found.append(n if d <= 1 else band)
        return torch.tensor(found, dtype=torch.int32)

    def video_blocks(self, grid: Grid) -> Tensor:
        reach = self.reach(grid)
        starts = range(0, grid.tokens, self.block)
        return torch.stack([self._row(grid, reach, start) for start in starts])

    def _row(self, grid: Grid, reach: Tensor, start: int) -> Tensor:
        """bool [n]: the blocks that the block of queries from `start` on attends."""
        stop = min(start + self.block, grid.tokens)
        return dense_enough(self._counts(grid, reach, start, stop) / (stop - start), self.block)

    def _counts(self, grid: Grid, reach: Tensor, start: int, stop: int) -> Tensor:
        """int32 [tokens]: how many of the queries from `start` to `stop` attend each key."""
        n = grid.height * grid.width
        frames, places = torch.arange(grid.frames)[:, None], torch.arange(n, dtype=torch.int32)
        found = torch.zeros(grid.frames, n, dtype=torch.int32)
        for frame in range(start // n, (stop - 1) // n + 1):
            first, last = max(start - frame * n, 0), min(stop - frame * n, n) - 1  # places of the queries in it
            far = reach[(frames - frame).abs()]
            here = (places + far).clamp(max=last) - (places - far).clamp(min=first)
            found += (here + 1).clamp(min=0)  # 0 too where `far` is -1
        if self.sink:
            found[0] = stop - start
        return found.flatten()


def dense_enough(columns: Tensor, block: int) -> Tensor:
    """The release's rule: bool [n] from the densities in [0, 1] of n blocks' columns, [columns], the last may be short.

    On where, of the columns with density > 0, more than 0.6 have density > 1/3.
    """
    columns = F.pad(columns, (0, -len(columns) % block)).view(count(len(columns), block), block)
    return (columns > DENSE).sum(1) > SHARE * (columns > 0).sum(1)
