"""torch's compiled flex_attention: a cross-check in inference.

Only ever compiled: called eagerly it ignores lists that carry no mask_mod and silently computes dense attention. On a
CPU torch 2.14 has neither a backward nor the LSE for it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention.converters import to_flex
from diffdistill.kernels.attention.layout import BlockLayout


def why_not(q: Tensor, layout: BlockLayout, key_bias: Tensor | None, return_lse: bool, gradient: bool) -> str | None:
    """The reason why flex cannot answer this call, or None."""
    if gradient:
        return "it has no backward on a CPU" if q.device.type == "cpu" else "its backward is not used here"
    if return_lse:
        return "its CPU path gives no LSE" if q.device.type == "cpu" else "its LSE is not used here"
    if key_bias is not None or layout.kv_valid is not None:
        return "it is handed whole blocks only, no key_bias and no kv_valid"
    if q.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16"
    if any(os.environ.get(name, "0") != "0" for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")):
        return "torch.compile is switched off in the environment"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Output [B, Hq, Sq, Dv]. The first call of a shape compiles, for tens of seconds."""
    # as soon as an input asks for a gradient flex refuses, even under no_grad
    return prepared(layout)(q.detach(), k.detach(), v.detach(), scale)


def prepared(layout: BlockLayout) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`attention` over one layout as a function of (q, k, v, scale), its lists converted once."""
    block_mask = to_flex(layout)

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        try:
            return _compiled()(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=grouped)
        except Exception as error:  # inductor and the compiler raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            fix = "Install a C++ compiler that torch.compile finds, or name another backend."
            raise UserError("backend", "must compile: flex_attention did not", reason, fix) from error

    return run


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: past dynamo's limit of recompilations an error, not an eager call, which would be dense
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
