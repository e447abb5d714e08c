"""Forward-mode derivatives: the only caller of torch's forward AD."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Value of `function` at `primals` and its derivative along `tangents`, exactly.

    primals, tangents: tensors of equal shapes, one tangent per argument. The function may return a tensor or a
    tuple of tensors; both results have that structure. No graph is kept: tangents are targets, so callers take the
    derivative here and run one ordinary pass for the gradient. Every operation inside needs a forward rule: fused
    attention has none, so torch's attention runs on its math backend here (the same function, more memory).
    """
    _load_forward_rules()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(function, primals, tangents)[:2]
    return value, tangent


@functools.cache
def _load_forward_rules() -> None:
    """torch loads its rules at the first use, through torch.jit, and tells users that torch.jit is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
