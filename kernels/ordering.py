"""Orders of the tokens of a video or an image, so that blocks of consecutive tokens are near in space and time.

Text tokens of a joint sequence always come last. Orders are cached per grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.gilbert import curve
from diffdistill.tracing import untraced

_Arguments = ParamSpec("_Arguments")
_Found = TypeVar("_Found")


def built_once(function: Callable[_Arguments, _Found]) -> Callable[_Arguments, _Found]:
    """Decorator: cached, for what is made of grids and serves every later call, those with a gradient too.

    Tensors are therefore made on the CPU and outside inference mode, whatever the first caller is in. torch.compile
    breaks its graph at the call: it would see through the cache and make them anew each time.
    """

    @cache
    @wraps(function)
    def built(*args: _Arguments.args, **keywords: _Arguments.kwargs) -> _Found:
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*args, **keywords)

    return untraced(cast("Callable[_Arguments, _Found]", built))


@dataclass(frozen=True)
class Grid:
    """Tokens of one sequence: frames x height x width after patching (an image has 1 frame), frames outermost.

    text: joint text tokens.  text_first: whether the model puts them before the others.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = True

    def __post_init__(self) -> None:
        sizes = (self.frames, self.height, self.width)
        if min(sizes) < 1 or self.text < 0:
            found = f"{sizes} and {self.text} text tokens"
            raise UserError("grid", "must have sizes >= 1 and text >= 0", found, "Count tokens after patching.")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def tokens(self) -> int:
        """Of the video alone."""
        return self.frames * self.height * self.width

    @property
    def length(self) -> int:
        """Of the sequence, text included."""
        return self.tokens + self.text

    def check(self, length: int) -> None:
        """Refuse a sequence of another length."""
        if length != self.length:
            what = f"{' x '.join(map(str, self.sizes))} and {self.text} of text"
            constraint = f"must match the sequence's {length} tokens"
            raise UserError("grid", constraint, f"{self.length}: {what}", "Give the sizes after patching.")


@dataclass(frozen=True, eq=False)
class Ordering:
    """A permutation of a sequence, with padding slots where its blocks are ragged.

    index: int64 [slots], the token that each slot holds; 0 where there is none.  inverse: int64 [length], the slot of
    each token.  real: bool [slots], None: every slot holds a token.  video: slots before the text.
    """

    index: Tensor
    inverse: Tensor
    real: Tensor | None
    video: int

    @property
    def slots(self) -> int:
        return len(self.index)

    def apply(self, x: Tensor) -> Tensor:
        """x [B, H, length, D] in this order, [B, H, slots, D]; padding slots are 0."""
        own = self.on(x.device)
        x = x.index_select(2, own.index)
        return x if own.real is None else x.masked_fill(~own.real[:, None], 0)

    def undo(self, x: Tensor) -> Tensor:
        """Inverse of `apply`; what padding slots hold is dropped."""
        return x.index_select(2, self.on(x.device).inverse)

    def on(self, device: torch.device | str) -> Ordering:
        """The same order with its tensors on `device`, copied once."""
        device = torch.device(device)
        if device == self.index.device:
            return self
        if device not in self._copies:
            real = None if self.real is None else self.real.to(device)
            with torch.inference_mode(False):
                moved = replace(self, index=self.index.to(device), inverse=self.inverse.to(device), real=real)
            self._copies[device] = moved
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Ordering]:
        return {}

    def valid(self, block: int) -> Tensor | None:
        """int32 [slots / block, rounded up]: real slots of each block, which are its first; None: all.

        Raises UserError where real slots are not the first of a block.
        """
        if self.real is None:
            return None
        real = torch.nn.functional.pad(self.real, (0, -self.slots % block)).view(-1, block)
        counts = real.sum(1, dtype=torch.int32)
        if not torch.equal(torch.arange(block, device=real.device) < counts[:, None], real):
            fix = "Take a block that divides the tile, or the tile's tokens."
            raise UserError("block", "must hold its real tokens first", block, fix)
        return counts


@built_once
def raster(grid: Grid) -> Ordering:
    """Frames, rows, columns as the model has them; text moved last."""
    return ordered(grid, torch.arange(grid.tokens))


@built_once
def transposed(grid: Grid) -> Ordering:
    """Position-major: all frames of one place beside each other, slot = place * frames + frame.

    A band of this order attends one place through time (SVG's temporal heads, 2502.01776).
    """
    return ordered(grid, torch.arange(grid.tokens).view(grid.frames, -1).T.flatten())


@built_once
def tiles(grid: Grid, tile: tuple[int, int, int]) -> Ordering:
    """Boxes of (frames, rows, columns) one after the other, frames outermost, and in raster order inside.

    tile: sizes >= 1. Tiles that the grid's edges cut are padded to the slots of a whole one, their tokens first: every
    tile has prod(tile) slots (VSA 2505.13389, STA 2502.04507).  Raises UserError for another tile.
    """
    check_tile(tile)
    frames, rows, columns = (-size % edge for size, edge in zip(grid.sizes, tile, strict=True))
    tokens = torch.arange(grid.tokens).view(grid.sizes)
    tokens = torch.nn.functional.pad(tokens, (0, columns, 0, rows, 0, frames), value=-1)
    boxes = tokens.unflatten(2, (-1, tile[2])).unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
    slots = boxes.permute(0, 2, 4, 1, 3, 5).reshape(-1, math.prod(tile))
    tokens_first = (slots < 0).to(torch.uint8).argsort(dim=1, stable=True)
    return ordered(grid, slots.gather(1, tokens_first).flatten())


def check_tile(tile: tuple[int, int, int]) -> None:
    """Refuse what is not three sizes >= 1."""
    if len(tile) != 3 or any(not isinstance(edge, int) or edge < 1 for edge in tile):
        raise UserError("tile", "must be three sizes >= 1: frames, rows, columns", tile, "(6, 8, 8) is STA's.")


@built_once
def gilbert(grid: Grid) -> Ordering:
    """Along a Hilbert curve through (width, height, frames): runs of tokens are compact in space and time.

    Runs of 64 tokens of 21 x 30 x 52 span 4.8 x 5.0 x 4.8 on average (in raster order 1.0 x 3.1 x 52). ASA's order
    (2508.10774).
    """
    x, y, t = torch.tensor(curve(grid.sizes[::-1])).unbind(1)
    return ordered(grid, (t * grid.height + y) * grid.width + x)


def ordered(grid: Grid, order: Tensor) -> Ordering:
    """The Ordering that visits the video's tokens in `order`, int64 [slots] of raster indices, -1 for padding."""
    real = order >= 0
    start = grid.text if grid.text_first else 0
    text = torch.arange(grid.text) + (0 if grid.text_first else grid.tokens)
    index = torch.cat((torch.where(real, order + start, 0), text))
    exists = torch.cat((real, torch.ones(grid.text, dtype=torch.bool)))
    inverse = torch.empty(grid.length, dtype=torch.int64)
    inverse[index[exists]] = torch.arange(len(index))[exists]
    return Ordering(index, inverse, None if bool(real.all()) else exists, len(order))
