"""Forward-mode derivatives: the only caller of torch's forward AD."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Value of `function` at `primals` and its derivative along `tangents`, exactly.

    primals, tangents: tensors of equal shapes, one tangent per argument. The function may return a tensor or a
    tuple of tensors; both results have that structure. No graph is kept: tangents are targets, so callers take the
    derivative here and run one ordinary pass for the gradient. Every operation inside needs a forward rule: fused
    attention has none, so torch's attention runs on its math backend here (the same function, more memory).
    """
    _load_forward_rules()
    mended = contextlib.nullcontext() if torch.__version__ >= "2.14" else _ContiguousGroupNorm()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mended:
        value, tangent = torch.func.jvp(function, primals, tangents)[:2]
    return value, tangent


@functools.cache
def _load_forward_rules() -> None:
    """torch loads its rules at the first use, through torch.jit, and tells users that torch.jit is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


class _ContiguousGroupNorm(TorchFunctionMode):
    """Before torch 2.14 the forward rule of group_norm fails on channels-last inputs, as diffusers' attention makes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))
