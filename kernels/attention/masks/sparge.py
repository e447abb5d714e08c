"""SpargeAttn's first stage (2502.18137): the mean of a block of similar tokens stands for it, other blocks are all on.

Training-free. Its second stage, which skips products of small probabilities inside the kernel, and its 8-bit types
are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention import pooling
from diffdistill.kernels.attention.layout import BLOCKS, BlockLayout
from diffdistill.kernels.attention.masks import selection
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.ordering import Grid, Ordering


@dataclass(frozen=True)
class Sparge(Mask):
    """theta: blocks whose tokens' mean cosine similarity is at most this attend, and are attended by, all; [-1, 1].
    -0.1 switches this off.

    tau: each row keeps its largest blocks as long as they make up at most this share of the pooled attention, at least
    one; (0, 1].  density: this share of the row's blocks in its place, at least one; the authors recommend 0.5 with
    theta -0.1. None: tau's rule.  block_q, block_k: 64 or 128 each.  order: raster | gilbert.
    Blocks with text attend, and are attended by, all. Raises UserError naming the field that does not fit.
    """

    theta: float = 0.6
    tau: float = 0.98
    density: float | None = None
    block_q: int = 128
    block_k: int = 64
    order: Literal["gilbert", "raster"] = "raster"

    def __post_init__(self) -> None:
        selection.check_curve(self.order)
        selection.check_shares(tau=self.tau, density=self.density)
        for name, block in (("block_q", self.block_q), ("block_k", self.block_k)):
            if block not in BLOCKS:
                raise UserError(name, f"must be one of {', '.join(map(str, BLOCKS))}", block, "128 x 64 is its own.")
        if not -1 <= self.theta <= 1:
            raise UserError("theta", "must lie in [-1, 1]", self.theta, "It is a cosine; -0.1 switches it off.")

    def ordering(self, grid: Grid) -> Ordering:
        return selection.along(self.order, grid)

    def layout(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLayout:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        middle = k.mean(2, keepdim=True)  # softmax does not see what keys share, similarity does
        alike_q = similarity(q, self.block_q) > self.theta
        alike_k = similarity(k, self.block_k, middle) > self.theta
        alike_k = alike_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        means = (pooling.block_means(q, self.block_q), pooling.block_means(k, self.block_k))
        logits = selection.logits(*means, scale).masked_fill(~alike_k[..., None, :], -torch.inf)
        kept = selection.largest(logits, self._counts(logits))
        kept |= ~alike_q[..., None] | ~alike_k[..., None, :]
        kept = selection.with_text(kept, self.ordering(grid), grid, self.block_q, self.block_k)
        return BlockLayout.from_mask(kept, q.shape[2], k.shape[2], self.block_q, self.block_k)

    def _counts(self, logits: Tensor) -> int | Tensor:
        """Blocks of each row."""
        if self.density is not None:
            return max(1, round(self.density * logits.shape[-1]))
        # where no column is left every block is on, whatever is counted
        mass = logits.softmax(-1).nan_to_num(0).sort(-1, descending=True).values.cumsum(-1)
        return (mass <= self.tau * mass[..., -1:]).sum(-1).clamp(min=1)


def similarity(x: Tensor, block: int, origin: Tensor | None = None) -> Tensor:
    """Mean cosine over all pairs of tokens of each block, [B, H, n] in [0, 1]: the squared length of their mean unit.

    x: [B, H, S, D] of float32 or float64.  origin: [B, H, 1, D], of the vectors whose cosines are taken; None: 0.
    """
    weights = 1 / torch.linalg.vector_norm(x if origin is None else x - origin, dim=-1).clamp(min=1e-12)
    filling = -x.shape[2] % block
    tokens = pooling.block_counts(x.shape[2], block, x.device)[:, None]
    weights = F.pad(weights, (0, filling)).unflatten(2, (-1, 1, block)) / tokens[..., None]
    x = F.pad(x, (0, 0, 0, filling)) if filling else x
    # a product in place of unit tokens: they would be a copy of the sequence
    units = (weights @ x.unflatten(2, (-1, block))).squeeze(-2)
    if origin is not None:
        units = units - weights.sum(-1) * origin
    return units.square().sum(-1)
