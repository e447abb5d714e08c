"""`block_sparse_attention`, the rule that picks its backend, and the torch operators behind it.

One operator computes output and LSE, a second one the gradients; both are opaque to torch.compile, with shapes for fake
tensors. Forward mode goes through an autograd function around the same operator, whose tangent is computed block by
block. `reference` and `flex` are torch's own programs and need no operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffdistill.autodiff import transforms
from diffdistill.errors import UserError
from diffdistill.kernels.attention import cpu, flex, gather, reference
from diffdistill.kernels.attention.layout import BlockLayout, described

Backend = Literal["reference", "cpu", "flex", "gather"]
BACKENDS: tuple[Backend, ...] = ("cpu", "gather", "flex", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Explanation:
    """backend: the one a call takes.  why: the reason.  refused: backend -> why it cannot answer this call."""

    backend: Backend
    why: str
    refused: dict[Backend, str]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Any:
    """softmax(scale q k^T + key_bias) v over the blocks of `layout`.

    q: [B, Hq, Sq, D], k: [B, Hkv, Skv, D], v: [B, Hkv, Skv, Dv], Hq a multiple of Hkv, of one type among bfloat16,
    float16, float32, float64; the native kernel does not copy strided views such as [B, S, H, D] transposed.
    scale: of the logits; None is D^-1/2.  key_bias: float32 [B|1, Hq|1, Skv], natural logarithms, -inf hides a key; it
    gets no gradient.  backend: None takes the rule's, see `explain`.

    Returns o [B, Hq, Sq, Dv] in q's type; with return_lse also the natural log of each query's sum, [B, Hq, Sq] float32
    (float64 for float64), through which gradients flow too. A query without keys gives 0 and -inf, and no gradient.
    Raises UserError naming the argument that does not fit, or the named backend that cannot answer and why.
    """
    chosen = explain(q, k, v, layout, scale, key_bias, return_lse, backend).backend
    scale = _scale(q, scale)
    if chosen == "reference":
        _note(chosen)
        o, lse = reference.attention(q, k, v, layout, scale, key_bias, gather.wide_type(q))
        o = o.to(q.dtype)
    elif chosen == "flex":
        _note(chosen)
        return flex.attention(q, k, v, layout, scale)
    else:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if _transforming():
            o, lse = _WithRules.apply(q, k, v, layout, scale, key_bias, chosen)
        else:
            o, lse = _run(q, k, v, layout, scale, key_bias, chosen)
    return (o, lse) if return_lse else o


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Explanation:
    """Which backend `block_sparse_attention` takes for these arguments, why, and why others cannot.

    The rule: `cpu` for what our kernel takes, else `gather`. `flex` and `reference` run only when they are named.
    Raises UserError as `block_sparse_attention` does.
    """
    _check(q, k, v, layout, scale, key_bias)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    gradient = gradient or (backend != "reference" and _transforming())
    reasons: dict[Backend, str | None] = {
        "cpu": _no_cpu_kernel(q, v),
        "flex": flex.why_not(q, layout, key_bias, return_lse, gradient),
    }
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if backend is None:
        if "cpu" not in refused:
            return Explanation("cpu", "the package's own kernel takes these tensors", refused)
        return Explanation("gather", f"the package's own kernel cannot: {refused['cpu']}", refused)
    if backend not in BACKENDS:
        raise UserError("backend", f"must be one of {', '.join(BACKENDS)}, or None", repr(backend), "Mend the name.")
    if backend in refused:
        fix = "Name another backend, or none."
        raise UserError("backend", f"must be able to answer this call: {refused[backend]}", repr(backend), fix)
    return Explanation(backend, "it was named", refused)


_backends: ContextVar[list[Backend] | None] = ContextVar("backends", default=None)


@contextmanager
def recorded_backends() -> Iterator[list[Backend]]:
    """Within the context the backend of every forward pass that ran is noted in the yielded list."""
    noted: list[Backend] = []
    token = _backends.set(noted)
    try:
        yield noted
    finally:
        _backends.reset(token)


def _note(backend: Backend) -> None:
    noted = None if torch.compiler.is_compiling() else _backends.get()
    if noted is not None:
        noted.append(backend)


# -- the operators --------------------------------------------------------------------------------------------

_KERNELS: dict[str, Any] = {"cpu": cpu, "gather": gather}


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
    layout = _trusted(q, k, kv_num, kv_idx, kv_valid, block_q, block_k)
    _note(backend)  # type: ignore[arg-type]
    return _KERNELS[backend].forward(q, k, v, layout, scale, key_bias)


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
    layout = _trusted(q, k, kv_num, kv_idx, kv_valid, block_q, block_k)
    return _KERNELS[backend].backward(d_o, d_lse, q, k, v, o, lse, layout, scale, key_bias)


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
    d_o = torch.zeros_like(saved[3]) if d_o is None else d_o
    d_o = d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    return (*_backward(d_o, d_lse, *saved, *ctx.rest), *nothing[3:])


_forward.register_autograd(_gradients, setup_context=_save)


def _run(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, key_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    lists = (layout.kv_num, layout.kv_idx, layout.kv_valid)
    return _forward(q, k, v, *lists, key_bias, layout.block_q, layout.block_k, scale, backend)


class _WithRules(torch.autograd.Function):
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
        return gather.tangent(tangents[:3], q, k, v, o, lse, ctx.layout, ctx.scale, ctx.key_bias)


def _trusted(
    q: Tensor, k: Tensor, kv_num: Tensor, kv_idx: Tensor, kv_valid: Tensor | None, block_q: int, block_k: int
) -> BlockLayout:
    """The layout that an operator was called with, checked when it was made."""
    layout = object.__new__(BlockLayout)
    fields = (block_q, block_k, q.shape[2], k.shape[2], kv_num, kv_idx, kv_valid)
    for name, value in zip(BlockLayout.__dataclass_fields__, fields, strict=True):
        object.__setattr__(layout, name, value)
    return layout


# -- the rule's parts -----------------------------------------------------------------------------------------


def _no_cpu_kernel(q: Tensor, v: Tensor) -> str | None:
    """Why the native kernel cannot take these tensors, or None."""
    if q.device.type != "cpu":
        return f"the tensors lie on {q.device.type}"
    return cpu.supports(q, v) or _cpu_kernel_missing()


@torch.compiler.assume_constant_result
def _cpu_kernel_missing() -> str | None:
    """Why the native kernel does not run on this machine, or None; the first call may compile it."""
    return cpu.why_not()


def _transforming() -> bool:
    """Whether forward mode or torch.func is at work. Of derivatives nested in each other only one is forward's."""
    if torch.compiler.is_compiling():
        return False
    found = transforms()
    if found.count("Jvp") > 1:  # torch takes the inner tangent's own derivative for zero
        fix = "Use backend='reference'."
        raise UserError("backend", "must be reference under two derivatives in forward mode", "None or a kernel", fix)
    return bool(found)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


# -- checks ---------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None, key_bias: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise UserError(name, "must be [batch, heads, tokens, width]", described(x), "Reshape it.")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            constraint = (
                f"must be {q.dtype} like q" if q.dtype in DTYPES else "must be bfloat16, float16, float32 or float64"
            )
            raise UserError(name, constraint, x.dtype, "Convert it.")
        if x.device != q.device:
            raise UserError(name, f"must lie on {q.device} like q", x.device, "Move it.")
        if 0 in x.shape:
            raise UserError(name, "must hold something in every dimension", list(x.shape), "Leave the call out.")
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        found = [x.shape[0] for x in (q, k, v)]
        raise UserError("q, k, v", "must have one batch size", found, "Expand the smaller ones.")
    if k.shape[3] != q.shape[3]:
        raise UserError("k", f"must have q's width {q.shape[3]}", k.shape[3], "Mend the projection.")
    if v.shape[1:3] != k.shape[1:3]:
        constraint = f"must have k's heads and tokens {list(k.shape[1:3])}"
        raise UserError("v", constraint, list(v.shape[1:3]), "Mend v.")
    if q.shape[1] % k.shape[1]:
        raise UserError(
            "k", f"must have a number of heads that divides q's {q.shape[1]}", k.shape[1], "Mend the heads."
        )
    _check_layout(q, k, layout)
    if scale is not None and not (isinstance(scale, float | int) and math.isfinite(scale)):
        raise UserError("scale", "must be a finite number or None", scale, "None is D^-1/2.")
    if key_bias is not None:
        _check_bias(q, k, key_bias)


def _check_layout(q: Tensor, k: Tensor, layout: BlockLayout) -> None:
    if not isinstance(layout, BlockLayout):
        raise UserError("layout", "must be a BlockLayout", type(layout).__name__, "BlockLayout.from_mask makes one.")
    if (layout.q_len, layout.kv_len) != (q.shape[2], k.shape[2]):
        constraint = f"must be for {q.shape[2]} queries and {k.shape[2]} keys"
        raise UserError("layout", constraint, f"one for {layout.q_len} and {layout.kv_len}", "Build it for these.")
    for name, size, own in (
        ("batches", q.shape[0], layout.kv_num.shape[0]),
        ("heads", q.shape[1], layout.kv_num.shape[1]),
    ):
        if own not in (1, size):
            raise UserError("layout", f"must have 1 or {size} {name}, as q has", own, "Build it for these.")
    if layout.device != q.device:
        raise UserError("layout", f"must lie on {q.device} like q", layout.device, "Move it: layout.to(device).")


def _check_bias(q: Tensor, k: Tensor, key_bias: Tensor) -> None:
    fits = isinstance(key_bias, Tensor) and key_bias.ndim == 3 and key_bias.dtype == torch.float32
    fits = fits and key_bias.shape[0] in (1, q.shape[0]) and key_bias.shape[1] in (1, q.shape[1])
    if not fits or key_bias.shape[2] != k.shape[2]:
        constraint = f"must be float32 [1 or {q.shape[0]}, 1 or {q.shape[1]}, {k.shape[2]}]"
        raise UserError("key_bias", constraint, described(key_bias), "One number per key, added to its logits.")
    if key_bias.device != q.device:
        raise UserError("key_bias", f"must lie on {q.device} like q", key_bias.device, "Move it.")
    if key_bias.requires_grad:
        raise UserError("key_bias", "must not ask for a gradient: it gets none", "requires_grad", "Detach it.")
