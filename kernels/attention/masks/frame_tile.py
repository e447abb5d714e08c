"""Attention within a frame and to a few frames that all share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention.layout import count
from diffdistill.kernels.attention.masks.static import StaticMask, check_block
from diffdistill.kernels.ordering import Grid


@dataclass(frozen=True)
class FrameTile(StaticMask):
    """Each frame attends itself and `references` frames spread evenly over the video (Efficient-vDiT, 2502.06155).

    references: from 0 to the grid's frames; they begin with the first frame.  block: 64 or 128 tokens.

    A block of the matrix is on if any of its pairs of tokens is, so where blocks straddle the edges of frames more is
    attended than the paper's mask has. It is exact where the tokens of a frame are a multiple of the block.
    Raises UserError for other values, `references` beyond the frames when the grid is known.
    """

    references: int
    block: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.references, int) or self.references < 0:
            raise UserError("references", "must be an integer >= 0", self.references, "Count frames.")
        check_block(self.block)

    def reference_frames(self, grid: Grid) -> Tensor:
        """int64 [references], ascending."""
        if self.references > grid.frames:
            constraint = f"must be at most the grid's {grid.frames} frames"
            raise UserError("references", constraint, self.references, "Lower it.")
        return torch.arange(self.references) * grid.frames // max(1, self.references)

    def video_blocks(self, grid: Grid) -> Tensor:
        attends = torch.eye(grid.frames, dtype=torch.bool)
        attends[:, self.reference_frames(grid)] = True
        touches = _touches(grid, self.block).float()
        return touches @ attends.float() @ touches.T > 0


def _touches(grid: Grid, block: int) -> Tensor:
    """bool [blocks, frames]: which frames a block holds tokens of."""
    per_frame = grid.height * grid.width
    starts = torch.arange(count(grid.tokens, block))[:, None] * block
    frames = torch.arange(grid.frames) * per_frame
    return (starts < frames + per_frame) & (starts + block > frames)
