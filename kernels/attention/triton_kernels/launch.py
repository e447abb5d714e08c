"""Launch the Triton kernels on tensors: the backend behind the operator."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from diffdistill.kernels.attention.layout import BlockLayout, count
from diffdistill.kernels.attention.triton_kernels import configs, schedule, support
from diffdistill.kernels.attention.triton_kernels.backward import delta_kernel, dkv_kernel, dq_kernel
from diffdistill.kernels.attention.triton_kernels.forward import forward_kernel
from diffdistill.kernels.attention.triton_kernels.pooling import means_kernel, scores_kernel
from diffdistill.kernels.attention.triton_kernels.tangent import tangent_kernel

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

INTERPRETED = support.interpreted()
LOG2_E = 1 / math.log(2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, Dv] in q's type and LSE float32 [B, Hq, Sq]."""
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    rows = schedule.of_queries(layout, *q.shape[:2])
    call = _Call("forward", q, k, v, layout, scale, key_bias, k, v)
    with call.device:
        forward_kernel[call.grid(rows, layout.block_q // call.tile.m)](
            q, *call.streamed, o, lse, *call.lists(rows), *call.strides(q, k, v), *call.list_strides(rows),
            *call.sizes(layout.num_k), **call.options(layout.kv_len % layout.block_k != 0),
        )  # fmt: skip
    return o, lse


def backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the inputs' type, contiguous."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    batch, heads, q_len, v_width = o.shape
    rows, columns = schedule.of_queries(layout, batch, heads), schedule.of_keys(layout, batch, k.shape[1])
    call = _Call("dq", q, k, v, layout, scale, key_bias, k, v)
    with call.device:
        delta_kernel[(count(q_len, 64), batch * heads)](
            d_o, o, lse, lse if d_lse is None else d_lse.contiguous(), delta, lse2, *d_o.stride()[:3], heads, q_len,
            64, v_width, _padded(v_width), d_lse is not None,
        )  # fmt: skip
        dq_kernel[call.grid(rows, layout.block_q // call.tile.m)](
            q, *call.streamed, d_o, lse2, delta, dq, *call.lists(rows), *call.strides(q, k, v, d_o),
            *call.list_strides(rows), *call.sizes(layout.num_k), **call.options(layout.kv_len % layout.block_k != 0),
        )  # fmt: skip
        call = _Call("dkv", q, k, v, layout, scale, key_bias, q, d_o)
        dkv_kernel[call.grid(columns, layout.block_k // call.tile.n)](
            call.streamed[0], k, v, call.streamed[1], lse2, delta, dk, dv, *call.lists(columns),
            *call.strides(q, k, v, d_o), *call.list_strides(columns), *call.sizes(layout.num_q, k.shape[1]),
            **call.options(q_len % layout.block_q != 0),
        )  # fmt: skip
    return dq, dk, dv


def tangent(
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tangents of output and LSE along those of q, k, v (None is 0)."""
    rows = schedule.of_queries(layout, *q.shape[:2])
    given = [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in tangents]
    moved = [x if t is None else t for t, x in zip(given, (q, k, v), strict=True)]
    o_dot, lse_dot = torch.empty_like(o), torch.empty_like(lse)
    call = _Call("tangent", q, k, v, layout, scale, key_bias, k, v, *moved[1:])
    with call.device:
        tangent_kernel[call.grid(rows, layout.block_q // call.tile.m)](
            q, *call.streamed[:2], moved[0], *call.streamed[2:], o, lse, o_dot, lse_dot, *call.lists(rows),
            *call.strides(q, k, v, *moved), *call.list_strides(rows), *call.sizes(layout.num_k),
            HAS_QT=given[0] is not None, HAS_KT=given[1] is not None, HAS_VT=given[2] is not None,
            **call.options(layout.kv_len % layout.block_k != 0),
        )  # fmt: skip
    return o_dot, lse_dot


def block_means(x: Tensor, block: int, valid: Tensor | None) -> Tensor:
    """Means of blocks of tokens, float32 [B, H, n, D]."""
    batch, heads, length, width = x.shape
    blocks = count(length, block)
    out = x.new_empty(batch, heads, blocks, width, dtype=torch.float32)
    with _on(x):
        means_kernel[(blocks, batch * heads)](
            x, out, out if valid is None else valid, *x.stride()[:3], heads, length, blocks,
            block, width, _padded(width), valid is not None,
        )  # fmt: skip
    return out


def block_scores(q: Tensor, k: Tensor, of_q: int, of_k: int, scale: float, peak: bool, tile: configs.Tile) -> Tensor:
    """Scores between blocks of tokens, float32 [B, Hq, nQ, nK]."""
    batch, heads, q_rows, width = q.shape
    k_rows = k.shape[2]
    out = q.new_empty(batch, heads, q_rows // of_q, k_rows // of_k, dtype=torch.float32)
    with _on(q):
        scores_kernel[(count(q_rows, tile.m), batch * heads)](
            q, k, out, *q.stride()[:3], *k.stride()[:3], heads, heads // k.shape[1], q_rows, k_rows, scale * LOG2_E,
            of_q, of_k, tile.m, tile.n, width, _padded(width), peak, _precision(q), INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


class _Call:
    """The arguments that every kernel takes."""

    def __init__(
        self,
        kernel: configs.Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        key_bias: Tensor | None,
        *streamed: Tensor,
    ) -> None:
        """streamed: what the kernel's loop reads, through the copy engine where that can: all of them or none."""
        self.q, self.k, self.v, self.layout, self.scale, self.bias = q, k, v, layout, scale, key_bias
        arch = support.architecture(q)
        usable = kernel == "dkv" or layout.kv_valid is None  # the copy engine cannot hide what lies in slots
        usable = usable and arch in configs.WITH_TMA and TensorDescriptor is not None
        self.tma = usable and all(_describable(x) for x in streamed)
        width = _padded(max(q.shape[-1], v.shape[-1]))
        loads: configs.Loads = "tma" if self.tma else "pointers"
        self.tile = configs.tile(arch, loads, q.element_size(), width, kernel, layout.block_q, layout.block_k)
        rows = self.tile.m if kernel == "dkv" else self.tile.n
        self.streamed = [_described(x, rows) for x in streamed] if self.tma else list(streamed)

    @property
    def device(self) -> AbstractContextManager[None]:
        return _on(self.q)

    def grid(self, rows: schedule.Schedule, tiles: int) -> tuple[int]:
        """tiles: of a row."""
        return (len(rows.order) * tiles,)

    def lists(self, rows: schedule.Schedule) -> tuple[Tensor, ...]:
        """Pointers that are absent stand for something that is not read."""
        valid = rows.num if self.layout.kv_valid is None else self.layout.kv_valid
        bias = rows.num if self.bias is None else self.bias.contiguous()
        return rows.num, rows.idx, rows.order, valid, bias

    def strides(self, *tensors: Tensor) -> list[int]:
        return [stride for x in tensors for stride in x.stride()[:3]]

    def list_strides(self, rows: schedule.Schedule) -> tuple[int, ...]:
        batches, heads, n = rows.num.shape
        strides = [0 if batches == 1 else heads * n, 0 if heads == 1 else n, rows.idx.shape[-1]]
        bias = (1, 1, 1) if self.bias is None else self.bias.shape
        return (*strides, 0 if bias[0] == 1 else bias[1] * bias[2], 0 if bias[1] == 1 else bias[2])

    def sizes(self, listed: int, heads: int | None = None) -> tuple[int | float, ...]:
        """listed: blocks that a list may hold.  heads: over which programs go, q's unless given."""
        heads = self.q.shape[1] if heads is None else heads
        group = self.q.shape[1] // self.k.shape[1]
        return heads, group, self.layout.q_len, self.layout.kv_len, listed, self.scale * LOG2_E

    def options(self, ragged: bool) -> dict[str, object]:
        width, v_width = self.q.shape[-1], self.v.shape[-1]
        return {
            "BLOCK_Q": self.layout.block_q,
            "BLOCK_K": self.layout.block_k,
            "TILE_M": self.tile.m,
            "TILE_N": self.tile.n,
            "D": width,
            "DV": v_width,
            "PAD_D": _padded(width),
            "PAD_DV": _padded(v_width),
            "HAS_VALID": self.layout.kv_valid is not None,
            "HAS_BIAS": self.bias is not None,
            "RAGGED": ragged,
            "PRECISION": _precision(self.q),
            "UPCAST": INTERPRETED,
            "TMA": self.tma,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }


def _described(x: Tensor, rows: int) -> Any:
    return TensorDescriptor.from_tensor(x, [1, 1, rows, _padded(x.shape[-1])])


def _describable(x: Tensor) -> bool:
    """Whether the copy engine can read it: rows of whole 16 bytes, at whole 16 bytes."""
    strides = [stride * x.element_size() for stride in x.stride()[:3]]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)


@cache
def _padded(width: int) -> int:
    """The products' tiles are powers of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def _precision(x: Tensor) -> str:
    """float32 as three products in TF32: as exact as float32's own, on tensor cores."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _on(x: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if INTERPRETED else torch.cuda.device(x.device)
