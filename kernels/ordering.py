"""Orders of the tokens of a video or an image, so that blocks of consecutive tokens are near in space and time.

Text tokens of a joint sequence always come last. Orders are cached per grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffdistill.errors import UserError


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
        x = x.index_select(2, self.index.to(x.device))
        if self.real is None:
            return x
        return x.masked_fill(~self.real.to(x.device)[:, None], 0)

    def undo(self, x: Tensor) -> Tensor:
        """Inverse of `apply`; what padding slots hold is dropped."""
        return x.index_select(2, self.inverse.to(x.device))

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


@cache
def raster(grid: Grid) -> Ordering:
    """Frames, rows, columns as the model has them; text moved last."""
    return ordered(grid, torch.arange(grid.tokens))


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
