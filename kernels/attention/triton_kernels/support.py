"""Which tensors the Triton kernels take. Imports no Triton, which may not be installed."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from diffdistill.kernels.attention.triton_kernels import configs
from diffdistill.tracing import constant

OLDEST = (8, 0)


def why_not(q: Tensor, v: Tensor, scale: float) -> str | None:
    """Why the kernels cannot take such tensors, or None."""
    if q.device.type != ("cpu" if interpreted() else "cuda"):
        return f"the tensors lie on {q.device.type}"
    if q.dtype == torch.float64:
        return "it takes bfloat16, float16 and float32"
    if scale <= 0:
        return "the scale is not positive"
    if (reason := missing(q.device.index)) is not None:
        return reason
    widest = configs.widest(architecture(q), q.element_size())
    if max(q.shape[-1], v.shape[-1]) > widest:
        return f"{'float32' if q.dtype == torch.float32 else 'the'} heads are wider than {widest}"
    return None


def architecture(x: Tensor) -> int:
    """The architecture whose configurations serve x's device."""
    return 90 if interpreted() else _architecture(x.device.index)


@constant
def _architecture(device: int | None) -> int:
    return configs.architecture(torch.cuda.get_device_capability(device))


@constant
def interpreted() -> bool:
    """Whether Triton interprets kernels on a CPU, for tests, as its environment variable asks."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant
def missing(device: int | None) -> str | None:
    """Why this machine cannot run them, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreted() and torch.cuda.get_device_capability(device) < OLDEST:
        return f"the GPU is older than sm_{OLDEST[0]}{OLDEST[1]}"
    return None
