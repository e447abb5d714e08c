"""The torch operators behind `block_sparse_attention`, their derivatives, and a record of which backend ran.

One operator computes output and LSE, a second one the gradients; both are opaque to torch.compile, with shapes for fake
tensors. Forward mode goes through an autograd function around the same operator, whose tangent is computed block by
block; a third operator hands the tangents' tensors to the GPU's kernel as they are, not wrapped by torch.func.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from diffdistill.autodiff import tangents_are_targets, transforms
from diffdistill.kernels.attention import cpu, gather
from diffdistill.kernels.attention.layout import BlockLayout

_recording: ContextVar[tuple[list[str], ...]] = ContextVar("recording", default=())


@contextmanager
def recorded_backends() -> Iterator[list[str]]:
    """Within the context the backend of every forward pass that ran is noted in the yielded list; contexts nest."""
    noted: list[str] = []
    token = _recording.set((*_recording.get(), noted))
    try:
        yield noted
    finally:
        _recording.reset(token)


def note(backend: str) -> None:
    """Tell every open recording that `backend` ran; compiled code tells when its operator runs."""
    if not torch.compiler.is_compiling():
        for noted in _recording.get():
            noted.append(backend)


def _kernel(backend: str) -> Any:
    """The module that computes. Triton may not be installed, and is loaded for tensors that need it."""
    if backend == "triton":
        return importlib.import_module("diffdistill.kernels.attention.triton_kernels.launch")
    return cpu if backend == "cpu" else gather


@torch.library.custom_op("diffdistill::block_sparse_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    kv_valid: Tensor | None,
    key_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout = BlockLayout.trusted(block_q, block_k, q.shape[2], k.shape[2], kv_num, kv_idx, kv_valid)
    note(backend)
    return _kernel(backend).forward(q, k, v, layout, scale, key_bias)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kv_num: Tensor, kv_idx: Tensor, kv_valid: Any, key_bias: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3]
    return q.new_empty(*shape, v.shape[-1]), q.new_empty(shape, dtype=gather.wide_type(q))


@torch.library.custom_op("diffdistill::block_sparse_attention_backward", mutates_args=())
def _backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    kv_valid: Tensor | None,
    key_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = BlockLayout.trusted(block_q, block_k, q.shape[2], k.shape[2], kv_num, kv_idx, kv_valid)
    return _kernel(backend).backward(d_o, d_lse, q, k, v, o, lse, layout, scale, key_bias)


@_backward.register_fake
def _(d_o: Tensor, d_lse: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_num, kv_idx, kv_valid, key_bias, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, kv_num, kv_idx, kv_valid, key_bias)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 11
    if d_o is None and d_lse is None:
        return nothing
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at the first look and refuses a second
    return (*_backward(_upstream(d_o, saved[3]), d_lse, *saved, *ctx.rest), *nothing[3:])


def _upstream(d_o: Tensor | None, o: Tensor) -> Tensor:
    """The output's gradient as kernels read it: there, and with rows in one piece."""
    d_o = torch.zeros_like(o) if d_o is None else d_o
    return d_o if d_o.stride(-1) == 1 else d_o.contiguous()


_forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("diffdistill::block_sparse_attention_tangent", mutates_args=())
def _tangent(
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    kv_valid: Tensor | None,
    key_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    layout = BlockLayout.trusted(block_q, block_k, q.shape[2], k.shape[2], kv_num, kv_idx, kv_valid)
    return _kernel("triton").tangent((q_dot, k_dot, v_dot), q, k, v, o, lse, layout, scale, key_bias)


@_tangent.register_fake
def _(
    q_dot: Any, k_dot: Any, v_dot: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), rest[0].new_empty(rest[0].shape)


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, key_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and LSE, by the operator, or past torch's dispatcher where nothing watches it: that takes a third of the
    host's time."""
    if type(q) is type(k) is type(v) is Tensor and not torch.compiler.is_compiling() and not _watched():
        return Direct.apply(q, k, v, layout, scale, key_bias, backend)
    return _run(q, k, v, layout, scale, key_bias, backend)


def _watched() -> bool:
    """Whether a mode sees operators: fake tensors, tracing, selective checkpointing, a count of operations."""
    return _get_current_dispatch_mode() is not None or bool(transforms())


def _run(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, key_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    lists = (layout.kv_num, layout.kv_idx, layout.kv_valid)
    return _forward(q, k, v, *lists, key_bias, layout.block_q, layout.block_k, scale, backend)


class Direct(torch.autograd.Function):
    """The operator's arithmetic in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        key_bias: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        note(backend)
        o, lse = _kernel(backend).forward(q, k, v, layout, scale, key_bias)
        ctx.save_for_backward(q, k, v, o, lse, key_bias)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.scale, ctx.backend = layout, scale, backend
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_o is None and d_lse is None:
            return (None,) * 7
        *saved, key_bias = ctx.saved_tensors
        rest = (ctx.layout, ctx.scale, key_bias)
        gradients = _kernel(ctx.backend).backward(_upstream(d_o, saved[3]), d_lse, *saved, *rest)
        return (*gradients, None, None, None, None)


class WithRules(torch.autograd.Function):
    """The operator with the rules of forward mode and torch.func, which torch.library does not take."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, key_bias: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _run(q, k, v, layout, scale, key_bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, ctx.layout, ctx.scale, ctx.key_bias, ctx.backend = inputs
        ctx.save_for_forward(q, k, v, *output)
        ctx.save_for_backward(q, k, v, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        layout = ctx.layout
        rest = (layout.kv_num, layout.kv_idx, layout.kv_valid, ctx.key_bias, layout.block_q, layout.block_k)
        grads = _backward(d_o.contiguous(), d_lse, *ctx.saved_tensors, *rest, ctx.scale, ctx.backend)
        return (*grads, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        q, k, v, o, lse = ctx.saved_tensors
        layout = ctx.layout
        wanted = torch.is_grad_enabled() and not tangents_are_targets()
        graph = wanted and any(x.requires_grad for x in (q, k, v))
        if ctx.backend != "triton" or graph or transforms() != ("Jvp",):  # another derivative follows: torch's own
            return gather.tangent(tangents[:3], q, k, v, o, lse, layout, ctx.scale, ctx.key_bias)
        rest = (layout.kv_num, layout.kv_idx, layout.kv_valid, ctx.key_bias, layout.block_q, layout.block_k)
        return _tangent(*tangents[:3], q, k, v, o, lse, *rest, ctx.scale)
