"""Scores between blocks by the native library: what pooling.py calls for tensors on a CPU."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from diffdistill.kernels.attention import cpu
from diffdistill.tracing import untraced


class _Scores(ctypes.Structure):
    """native/attention.h's Scores, field by field."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "num_q", "num_k", "of_q", "of_k", "width")),
        ("q", cpu.Rows),
        ("k", cpu.Rows),
        ("out", c_void_p),
        *((name, c_int32) for name in ("dtype", "variant", "threads", "peak")),
        ("scale", c_float),
    ]


def why_not(q: Tensor) -> str | None:
    """Why `block_scores` cannot take q, [B, H, S, D], and keys like it; None if it can."""
    return cpu.supports(q, q) or cpu.why_not()


@untraced  # a call of C is nothing to trace
def block_scores(q: Tensor, k: Tensor, of_q: int, of_k: int, scale: float, peak: bool) -> Tensor:
    """pooling.block_scores before its rows are normalised, for tensors that it has checked; unit last strides."""
    library = cpu.library()
    assert library.attention_scores_size() == ctypes.sizeof(_Scores)
    found = torch.empty(*q.shape[:2], q.shape[2] // of_q, k.shape[2] // of_k)
    call = _Scores(q.shape[0], q.shape[1], k.shape[1], *found.shape[2:], of_q, of_k, q.shape[3])
    call.q, call.k = (cpu.Rows(x.data_ptr(), *x.stride()[:3]) for x in (q, k))
    call.out = found.data_ptr()
    call.dtype, call.variant = cpu.DTYPES[q.dtype], cpu.VARIANTS.index(cpu.variant())
    call.threads, call.peak, call.scale = torch.get_num_threads(), peak, scale
    cpu.succeeded(library.attention_block_scores(ctypes.byref(call)), "block scores")
    return found
