"""Attention to what lies near in the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError, require_positive
from diffdistill.kernels.attention.layout import BLOCKS
from diffdistill.kernels.attention.masks.static import StaticMask
from diffdistill.kernels.ordering import Grid, Ordering, check_tile, tiles


@dataclass(frozen=True)
class Disk(StaticMask):
    """Tokens attend those at dy^2 + dx^2 < radius^2 (CLEAR, 2412.16112), by whole blocks.

    The layout has no mask inside blocks. reduce="any": a block is on if any of its pairs is near enough, so more is
    attended than CLEAR's mask has (at 64 x 64 tokens and radius 8, 16, 32: 12, 28, 65% in place of 4, 16, 48%).
    reduce="all": if all are, so less is.

    radius: in tokens, > 0.  tile: tokens in (frames, rows, columns), 64 or 128 in all, the mask's blocks.  In a video
    all frames count: the disk is a cylinder through time.  Raises UserError for other values, and where a radius is too
    small for reduce="all": it must exceed the tile's diagonal, else tiles would not attend even themselves.
    """

    radius: float
    tile: tuple[int, int, int] = (1, 8, 8)
    reduce: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        require_positive(radius=self.radius)
        object.__setattr__(self, "tile", tuple(self.tile))
        check_tile(self.tile)
        if self.block not in BLOCKS:
            found = f"{self.tile}: {self.block} tokens"
            raise UserError("tile", "must hold 64 or 128 tokens", found, "(1, 8, 8) or (1, 8, 16).")
        if self.reduce not in ("any", "all"):
            raise UserError("reduce", "must be any or all", repr(self.reduce), "Mend the name.")
        diagonal = math.hypot(self.tile[1] - 1, self.tile[2] - 1)
        if self.reduce == "all" and self.radius <= diagonal:
            constraint = f"must exceed the tile's diagonal {diagonal:.3g} with reduce='all'"
            raise UserError("radius", constraint, self.radius, "Take reduce='any'.")

    @property
    def block(self) -> int:
        return math.prod(self.tile)

    def ordering(self, grid: Grid) -> Ordering:
        return tiles(grid, self.tile)

    def video_blocks(self, grid: Grid) -> Tensor:
        squares = torch.zeros(1, 1, dtype=torch.int64)
        for size, edge in ((grid.height, self.tile[1]), (grid.width, self.tile[2])):
            apart = _apart(size, edge, self.reduce).square()
            squares = (squares[:, None, :, None] + apart[None, :, None, :]).flatten(2).flatten(0, 1)
        frames = -(-grid.frames // self.tile[0])
        return (squares < self.radius**2).repeat(frames, frames)


def _apart(size: int, edge: int, reduce: str) -> Tensor:
    """int64 [n, n]: how far the nearest (any) or farthest (all) rows of each two tiles are, along one axis."""
    first = torch.arange(0, size, edge)
    last = (first + edge).clamp(max=size) - 1
    if reduce == "any":
        return torch.maximum(first - last[:, None], first[:, None] - last).clamp(min=0)
    return torch.maximum(last - first[:, None], last[:, None] - first)
