"""Sliding tile attention: a window of whole tiles around each tile of queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.masks.static import StaticMask
from diffdistill.kernels.ordering import Grid, Ordering, check_tile, tiles

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class SlidingTile(StaticMask):
    """Each tile attends the `window` of tiles around it, moved inwards at the grid's edges (STA, 2502.04507).

    window: tiles in (frames, rows, columns); one, or a tuple of one per head. Each size is odd, or all the tiles that
    the grid has along it.  tile: tokens in (frames, rows, columns), a multiple of 64 in all.

    Blocks are of 128 tokens where tiles are multiples of that, else of 64; every block lies in one tile, so the mask is
    exact.  Raises UserError for what does not fit, windows when the grid is known.
    """

    window: Sizes | tuple[Sizes, ...] = (3, 3, 3)
    tile: Sizes = (6, 8, 8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        check_tile(self.tile)
        if math.prod(self.tile) % 64:
            found = f"{self.tile}: {math.prod(self.tile)} tokens"
            raise UserError("tile", "must hold a multiple of 64 tokens", found, "(6, 8, 8) is STA's.")
        parts = tuple(part if isinstance(part, int) else tuple(part) for part in self.window)
        object.__setattr__(self, "window", parts)
        for window in self.windows:
            if len(window) != 3 or any(not isinstance(size, int) or size < 1 for size in window):
                raise UserError("window", "must be three sizes >= 1, or such for each head", self.window, "Mend it.")

    @property
    def windows(self) -> tuple[Sizes, ...]:
        """One per head, or one for all."""
        per_head = len(self.window) > 0 and all(isinstance(part, tuple) for part in self.window)
        return self.window if per_head else (self.window,)  # type: ignore[return-value]

    @property
    def block(self) -> int:
        return 64 if math.prod(self.tile) % 128 else 128

    def ordering(self, grid: Grid) -> Ordering:
        return tiles(grid, self.tile)

    def layout(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLayout:
        if len(self.windows) not in (1, q.shape[1]):
            constraint = f"must be one, or one for each of the {q.shape[1]} heads"
            raise UserError("window", constraint, f"{len(self.windows)} windows", "Give one per head.")
        return super().layout(q, k, grid, scale)

    def video_blocks(self, grid: Grid) -> Tensor:
        numbers = tuple(-(-size // edge) for size, edge in zip(grid.sizes, self.tile, strict=True))
        on = torch.stack([_window_tiles(window, numbers) for window in self.windows])
        repeats = math.prod(self.tile) // self.block
        return on.repeat_interleave(repeats, -1).repeat_interleave(repeats, -2)


def _window_tiles(window: Sizes, numbers: tuple[int, ...]) -> Tensor:
    """bool [tiles, tiles]: which each attends, of so many along each axis."""
    for size, number, axis in zip(window, numbers, ("frames", "rows", "columns"), strict=True):
        if size > number or (size % 2 == 0 and size != number):
            constraint = f"must be odd and at most {number}, or {number}, in {axis}: the grid has {number} tiles there"
            raise UserError("window", constraint, size, "Change the window or the tile.")
    on = torch.ones(1, 1, dtype=torch.bool)
    for size, number in zip(window, numbers, strict=True):
        tile = torch.arange(number)
        first = (tile - size // 2).clamp(0, number - size)[:, None]
        on = torch.kron(on, (tile >= first) & (tile < first + size))
    return on
