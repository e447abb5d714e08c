"""`block_sparse_attention`, the rule that picks its backend, and the checks of its arguments.

`triton`, `cpu` and `gather` run behind torch operators (operators.py); `reference` and `flex` are torch's own programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.autodiff import transforms
from diffdistill.errors import UserError
from diffdistill.kernels.attention import cpu, flex, gather, reference
from diffdistill.kernels.attention.layout import BlockLayout, described
from diffdistill.kernels.attention.operators import WithRules, note, run
from diffdistill.kernels.attention.triton_kernels import support
from diffdistill.tracing import constant

Backend = Literal["reference", "triton", "cpu", "flex", "gather"]
BACKENDS: tuple[Backend, ...] = ("triton", "cpu", "gather", "flex", "reference")
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
    _check(q, k, v, layout, scale, key_bias)
    scale, transforming = _scale(q, scale), _transforming()
    chosen: Backend
    if backend is None:
        own = _own(q)
        chosen = own if _own_refusal(own, q, v, scale) is None else "gather"
    else:
        chosen = _named(backend, _refusals(q, k, v, layout, scale, key_bias, return_lse, backend, transforming))
    if chosen == "reference":
        note(chosen)
        o, lse = reference.attention(q, k, v, layout, scale, key_bias, gather.wide_type(q))
        o = o.to(q.dtype)
    elif chosen == "flex":
        note(chosen)
        return flex.attention(q, k, v, layout, scale)
    else:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if transforming:
            o, lse = WithRules.apply(q, k, v, layout, scale, key_bias, chosen)
        else:
            o, lse = run(q, k, v, layout, scale, key_bias, chosen)
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

    The rule: `triton` on a GPU, `cpu` on a CPU, for what these kernels take, else `gather`. `flex` and `reference` run
    only when they are named. Raises UserError as `block_sparse_attention` does.
    """
    _check(q, k, v, layout, scale, key_bias)
    refused = _refusals(q, k, v, layout, _scale(q, scale), key_bias, return_lse, backend, _transforming())
    if backend is not None:
        return Explanation(_named(backend, refused), "it was named", refused)
    own = _own(q)
    if own not in refused:
        return Explanation(own, "the package's own kernel takes these tensors", refused)
    return Explanation("gather", f"the package's own kernel cannot: {refused[own]}", refused)


# -- the rule's parts -----------------------------------------------------------------------------------------


def _own(q: Tensor) -> Literal["triton", "cpu"]:
    """The package's kernel for q's device."""
    return "triton" if q.is_cuda else "cpu"


def _own_refusal(own: Literal["triton", "cpu"], q: Tensor, v: Tensor, scale: float) -> str | None:
    """Why that kernel cannot take these tensors, or None."""
    if own == "triton":
        return support.why_not(q, v, scale)
    if q.device.type != "cpu":
        return f"the tensors lie on {q.device.type}"
    return cpu.supports(q, v) or _cpu_kernel_missing()


def _refusals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
    backend: str | None,
    transforming: bool,
) -> dict[Backend, str]:
    """Why backends cannot answer this call; those that can are absent."""
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    gradient = gradient or (backend != "reference" and transforming)
    reasons: dict[Backend, str | None] = {
        "triton": _own_refusal("triton", q, v, scale),
        "cpu": _own_refusal("cpu", q, v, scale),
        "flex": flex.why_not(q, layout, key_bias, return_lse, gradient),
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _named(backend: str, refused: dict[Backend, str]) -> Backend:
    """The backend of this name, which must be able to answer."""
    if backend not in BACKENDS:
        raise UserError("backend", f"must be one of {', '.join(BACKENDS)}, or None", repr(backend), "Mend the name.")
    if backend in refused:
        fix = "Name another backend, or none."
        raise UserError("backend", f"must be able to answer this call: {refused[backend]}", repr(backend), fix)
    return backend


@constant
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
