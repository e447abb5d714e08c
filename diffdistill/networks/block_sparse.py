"""Block-sparse attention as a value that `set_attention` takes: which mask, on which layers, at which times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention import api
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.masks import base
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.attention.operators import note
from diffdistill.kernels.ordering import Grid
from diffdistill.networks.call import current_call
from diffdistill.networks.token_grid import current_grid


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """Attention over the blocks of a mask; cross-attention, attention over text alone and `dense_layers` stay stock.

    mask: a Mask, which orders the tokens by their grid; or a layout, or a function of (q, k) that gives one, called
    without gradients, both for tokens in the model's order and with lengths that include joint text tokens.
    backend: of `block_sparse_attention`, None takes the rule's.  dense_layers: indices of self-attentions, in the
    network's order, that are left as they are.  dense_above: samples whose time, of the Call's process, lies above it
    attend densely; only calls through a view of the network have a time, a pipeline's have none.  grid: of a Mask's
    tokens, for models that do not tell it; Wan, CogVideoX, HunyuanVideo, LTX, PixArt, DiT and Flux do.
    The model's own mask may hide keys, [B|1, H|1, 1, N].

    For an exported pipeline: `set_attention(pipe.transformer, BlockSparse(mask=ASA(density=0.2)), roles=None)`.
    Raises UserError for what is none of these.
    """

    mask: BlockLayout | Mask | Callable[[Tensor, Tensor], BlockLayout]
    backend: api.Backend | None = None
    dense_layers: Sequence[int] = ()
    dense_above: float | None = None
    grid: Grid | None = None
    cross: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mask, BlockLayout | Mask) and not callable(self.mask):
            constraint = "must be a BlockLayout or a function of (q, k), or a Mask"
            raise UserError("mask", constraint, repr(self.mask), "Give one.")
        if self.backend is not None and self.backend not in api.BACKENDS:
            legal = ", ".join(api.BACKENDS)
            raise UserError("backend", f"must be one of {legal}, or None", repr(self.backend), "Mend the name.")
        if self.grid is not None and not (isinstance(self.grid, Grid) and isinstance(self.mask, Mask)):
            raise UserError("grid", "must be a Grid, for a Mask", f"{self.grid!r} for {self._what()}", "Leave it out.")
        if self.dense_above is not None and not isinstance(self.dense_above, float | int):
            fix = "Give a time of the process."
            raise UserError("dense_above", "must be a number or None", repr(self.dense_above), fix)

    @property
    def needs_grid(self) -> bool:
        """Whether the model's inputs must tell the grid."""
        return isinstance(self.mask, Mask) and self.grid is None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layout: BlockLayout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        dense = self._dense(len(q))
        if not any(dense):
            return self._sparse(q, k, v, scale, layout, mask)
        if all(dense):
            return _stock(q, k, v, scale, mask)
        # a batch on both sides of the bound: each part on its own, then back in its place
        high, low = (torch.tensor(list(compress(range(len(q)), side))) for side in (dense, map(not_, dense)))
        mask_high, mask_low = (None if mask is None else _rows(mask, side) for side in (high, low))
        stock = _stock(_rows(q, high), _rows(k, high), _rows(v, high), scale, mask_high)
        sparse = self._sparse(_rows(q, low), _rows(k, low), _rows(v, low), scale, layout, mask_low, low)
        return torch.cat((stock, sparse))[torch.cat((high, low)).argsort().to(q.device)]

    def ready(self) -> None:
        """Raise UserError if the named backend does not run at all."""
        x = torch.zeros(1, 1, 1, 64)
        api.explain(x, x, x, BlockLayout.full(1, 1), backend=self.backend)

    def explain(self) -> str:
        above = "" if self.dense_above is None else f", dense above time {self.dense_above}"
        return f"block_sparse_attention over {self._what()}{above}, backend {self.backend or 'by its rule'}"

    def _what(self) -> str:
        """The mask, in words."""
        if isinstance(self.mask, BlockLayout):
            return "a fixed layout"
        return repr(self.mask) if isinstance(self.mask, Mask) else getattr(self.mask, "__name__", repr(self.mask))

    def _dense(self, batch: int) -> tuple[bool, ...]:
        """Of each sample whether its time asks for dense attention."""
        if self.dense_above is None:
            return (False,) * batch
        call = current_call()
        if call is None or call.t is None:
            found = "no call" if call is None else f"a call of {call.role} without t"
            fix = "Call the network through a view such as Denoiser; leave dense_above out for a pipeline."
            raise UserError("dense_above", "needs the time of the call in progress", found, fix)
        dense = call.above(float(self.dense_above))
        if len(dense) != batch:
            constraint = f"needs one time for each of the {batch} samples that attend"
            raise UserError("dense_above", constraint, len(dense), "Leave it out for this network.")
        return dense

    def _sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        layout: BlockLayout | None,
        mask: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """rows: of the batch, which these tensors are; None: all."""
        bias = None if mask is None else _key_bias(mask)
        if layout is None and isinstance(self.mask, Mask):
            return base.attention(q, k, v, self._grid(), self.mask, scale, bias, self.backend)
        layout = self._layout(q, k) if layout is None else layout
        if rows is not None and len(layout.kv_num) > len(q):  # it was made for the whole batch
            layout = _of_rows(layout, rows)
        return api.block_sparse_attention(q, k, v, layout, scale, bias, backend=self.backend)

    def _grid(self) -> Grid:
        grid = current_grid() if self.grid is None else self.grid
        if grid is None:
            fix = "Call the whole model with its sizes, or give BlockSparse(mask=..., grid=Grid(...))."
            raise UserError("grid", "must be told by the model's inputs or given", "neither", fix)
        return grid

    def _layout(self, q: Tensor, k: Tensor) -> BlockLayout:
        mask = self.mask
        assert not isinstance(mask, Mask)
        if isinstance(mask, BlockLayout):
            return mask
        with torch.no_grad():
            return mask(q, k)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a term of the logits."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _key_bias(mask: Tensor) -> Tensor:
    """A mask [B|1, H|1, 1, N] as float32 [B|1, H|1, N]."""
    if mask.ndim != 4 or mask.shape[2] != 1:
        found = f"a mask {list(mask.shape)}"
        raise UserError("attention", "must take masks of keys alone, [B, H, 1, N]", found, "Keep the stock processor.")
    return added(mask, torch.float32)[:, :, 0].contiguous()


def _stock(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    note("sdpa")
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Those samples of x [B, ..]; all of x [1, ..], which stands for every sample."""
    return x if len(x) == 1 else x[rows.to(x.device)]


def _of_rows(layout: BlockLayout, rows: Tensor) -> BlockLayout:
    lists = (_rows(layout.kv_num, rows), _rows(layout.kv_idx, rows))
    sizes = (layout.block_q, layout.block_k, layout.q_len, layout.kv_len)
    return BlockLayout.trusted(*sizes, *lists, layout.kv_valid)
