"""What every mask is: an order of tokens and the blocks that are computed in it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffdistill.kernels.attention import api
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.ordering import Grid, Ordering, raster


class Mask(ABC):
    """Which blocks of a sequence's attention matrix are computed. A value: subclasses are frozen dataclasses."""

    def ordering(self, grid: Grid) -> Ordering:
        """The order that tokens must be in."""
        return raster(grid)

    @abstractmethod
    def layout(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLayout:
        """The blocks, for q, k [B, H, slots, D] in this mask's order. No gradient goes through the choice."""

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
        """Attention [B, H, slots, D] of q, k, v in this mask's order; masks with more than one branch override it."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.no_grad():
            layout = self.layout(q, k, grid, scale)
        return api.block_sparse_attention(q, k, v, layout, scale, key_bias, backend=backend)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    mask: Mask,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: api.Backend | None = None,
) -> Tensor:
    """Attention over `mask`'s blocks of a sequence in the model's order, [B, H, length, D].

    key_bias: float32 [B|1, H|1, length].  Raises UserError where the grid does not match the tokens.
    """
    grid.check(q.shape[2])
    order = mask.ordering(grid)
    if key_bias is not None:
        key_bias = order.apply(key_bias[..., None])[..., 0].contiguous()
    q, k, v = (order.apply(x) for x in (q, k, v))
    return order.undo(mask.attend(q, k, v, grid, scale, key_bias, backend))
