"""Marks for torch.compile that do not import the compiler, which takes most of a second: torch.compiler's own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """As torch.compiler.assume_constant_result: compiled code holds what it returns while tracing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: F) -> F:
    """As torch.compiler.disable: compiled code calls it as it is."""
    return cast("F", torch._disable_dynamo(function))
