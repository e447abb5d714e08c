"""Video sparse attention, VSA (2505.13389): tiles of space-time, a coarse branch over them that picks what is computed.

The tile's mean tokens attend each other; the largest scores of each row are the blocks of the fine branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels import ordering
from diffdistill.kernels.attention import api, pooling
from diffdistill.kernels.attention.layout import BLOCKS, BlockLayout, lists
from diffdistill.kernels.attention.masks import selection
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.ordering import Grid, Ordering, built_once


@dataclass(frozen=True)
class VSA(Mask):
    """density: share of key blocks in every row, rounded up, (0, 1]; 1 - sparsity of the paper.

    tile: frames, rows and columns of a tile; `block`, 64 or 128, divides its tokens. Edge tiles have padding slots,
    which nothing attends.  coarse: weight of the coarse branch, o = coarse o_c + o_f, with gradients; 0 leaves it out.
    The paper's gate is a linear layer of its own in the model, 0 at first when a dense model is adapted: start from 0.
    A coarse branch takes no key_bias, as means have none. Blocks with text attend, and are attended by, all.

    Raises UserError naming the field that does not fit.
    """

    density: float = 0.125
    tile: tuple[int, int, int] = (4, 4, 4)
    block: int = 64
    coarse: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))  # a configuration has a list
        selection.check_shares(density=self.density)
        if self.block not in BLOCKS:
            raise UserError("block", f"must be one of {', '.join(map(str, BLOCKS))}", self.block, "64 is VSA's.")
        if len(self.tile) != 3 or min(self.tile) < 1 or math.prod(self.tile) % self.block:
            constraint = f"must be three sizes >= 1 of a multiple of {self.block} tokens"
            raise UserError("tile", constraint, self.tile, "(4, 4, 4) is VSA's, of 64 tokens.")
        if not math.isfinite(self.coarse):
            raise UserError("coarse", "must be finite", self.coarse, "0 leaves the branch out.")

    def ordering(self, grid: Grid) -> Ordering:
        return ordering.tiles(grid, self.tile)

    def layout(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLayout:
        return self._layout(self._logits(q, k, grid, scale), q.shape[2], grid)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        scale: float | None = None,
        key_bias: Tensor | None = None,
        backend: api.Backend | None = None,
    ) -> Tensor:
        if self.coarse == 0:
            return super().attend(q, k, v, grid, scale, key_bias, backend)
        if key_bias is not None:
            raise UserError("key_bias", "must be None with a coarse branch", "a bias", "Set coarse to 0.")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = self._logits(q, k, grid, scale)
        with torch.no_grad():
            layout = self._layout(logits, q.shape[2], grid)
        fine = api.block_sparse_attention(q, k, v, layout, scale, backend=backend)
        means = pooling.block_means(v, self.block, _counts(self, grid, v.device))
        coarse = logits.softmax(-1) @ means.repeat_interleave(q.shape[1] // v.shape[1], 1)
        coarse = coarse.repeat_interleave(self.block, 2)[:, :, : q.shape[2]]
        return (self.coarse * coarse + fine).to(q.dtype)

    def _logits(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> Tensor:
        """[B, Hq, nQ, nK] between mean tokens; -inf for blocks of padding alone."""
        valid = _counts(self, grid, q.device)
        q, k = (pooling.block_means(x, self.block, valid) for x in (q, k))
        found = selection.logits(q, k, scale)
        return found if valid is None else found.masked_fill(valid == 0, -torch.inf)

    def _layout(self, logits: Tensor, length: int, grid: Grid) -> BlockLayout:
        valid = _counts(self, grid, logits.device)
        num = logits.shape[-1] if valid is None else _filled(self, grid)
        # a product such as 0.1 * 30 may lie a rounding above its value
        kept = selection.largest(logits, max(1, math.ceil(self.density * num - 1e-9)))
        kept = selection.with_text(kept, self.ordering(grid), grid, self.block, self.block)
        if valid is not None:
            kept = kept & (valid > 0) & (valid > 0)[:, None]
        return BlockLayout.trusted(self.block, self.block, length, length, *lists(kept), valid)


@built_once
def _counts(mask: VSA, grid: Grid, device: torch.device) -> Tensor | None:
    """Tokens that exist of each block, int32 [n]; None: all."""
    found = mask.ordering(grid).valid(mask.block)
    return None if found is None else found.to(device)


@built_once
def _filled(mask: VSA, grid: Grid) -> int:
    """Blocks with any token."""
    found = _counts(mask, grid, torch.device("cpu"))
    assert found is not None
    return int((found > 0).sum())
