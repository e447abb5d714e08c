"""Forward-mode derivatives: the only caller of torch's forward AD."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from diffdistill.errors import UserError
from diffdistill.forward_rules import Rules


class Tangent(Protocol):
    """How a method takes its derivatives: exactly, or by differences where a network has no forward-mode rules.

    Called like `jvp`, but the value has its graph where gradients are enabled. All calls of the function share their
    dropout masks.  one_pass: whether value and derivative may come from one call of the function, see
    `Networks.one_pass`.  reach: how far from its point it evaluates, in units of the tangents.
    """

    @property
    def reach(self) -> float: ...

    def __call__(
        self,
        function: Callable[..., Tensor],
        primals: tuple[Tensor, ...],
        tangents: tuple[Tensor, ...],
        one_pass: bool = False,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Exact:
    """By forward mode."""

    @property
    def reach(self) -> float:
        return 0.0

    def __call__(
        self,
        function: Callable[..., Tensor],
        primals: tuple[Tensor, ...],
        tangents: tuple[Tensor, ...],
        one_pass: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if one_pass or not torch.is_grad_enabled():
            return jvp(function, primals, tangents, graph=torch.is_grad_enabled())
        with torch.random.fork_rng():
            tangent = jvp(function, primals, tangents)[1]
        return function(*primals), tangent


@dataclass(frozen=True)
class CentralDifference:
    """[f(x + h v) - f(x - h v)] / 2h, off by the order of h^2; any kernel will do, three calls, of which the value's
    is one.

    step: h, a share of the tangents. With float32 networks 1e-2 to 1e-3: the rounding of f counts 1/h times.
    All calls start from one state of torch's generator, so they share their dropout masks.
    """

    step: float

    def __post_init__(self) -> None:
        if not 0 < self.step < 1:
            raise UserError("step", "must lie in (0, 1)", self.step, "1e-2 is a good number in float32.")

    @property
    def reach(self) -> float:
        return self.step

    def __call__(
        self,
        function: Callable[..., Tensor],
        primals: tuple[Tensor, ...],
        tangents: tuple[Tensor, ...],
        one_pass: bool = False,
    ) -> tuple[Tensor, Tensor]:
        def at(share: float) -> Tensor:
            with torch.random.fork_rng():
                return function(*(p + share * v for p, v in zip(primals, tangents, strict=True)))

        with torch.no_grad():
            tangent = (at(self.step) - at(-self.step)) / (2 * self.step)
        return function(*primals), tangent


def jvp(
    function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], graph: bool = False
) -> tuple[Any, Any]:
    """Value of `function` at `primals` and its derivative along `tangents`, exactly.

    primals, tangents: tensors of equal shapes, one tangent per argument. The function may return a tensor or a
    tuple of tensors; both results have that structure.  graph: the value keeps the graph that an ordinary call would
    have, so that one pass gives a target and a gradient; derivatives have none.  Every operation inside needs a forward
    rule: fused attention has none, so torch's attention runs on its math backend here (the same function, more memory)
    where `Rules` has none either.
    """
    _load_forward_rules()
    mended = _ContiguousGroupNorm() if _MENDED else contextlib.nullcontext()
    token = _targets.set(graph)
    alone = hasattr(eager_transforms, "JVP_NESTING") and not transforms()
    taken, rules = (_by_duals, Rules()) if alone else (torch.func.jvp, contextlib.nullcontext())
    try:
        with torch.set_grad_enabled(graph), sdpa_kernel(SDPBackend.MATH), mended, rules:
            value, tangent = taken(function, primals, tangents)[:2]
    finally:
        _targets.reset(token)
    return value, pytree.tree_map(Tensor.detach, tangent) if graph else tangent


def _by_duals(
    function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Any, Any]:
    """As `torch.func.jvp`, where no other transform is under way: tensors that carry their tangents, without the
    wrappers by which torch.func tells levels apart, which cost every small operation more than it takes.

    Its count of levels is not public: where a torch has none, `jvp` is torch.func's.
    """
    token = _duals.set(True)
    eager_transforms.JVP_NESTING += 1  # a torch.func.jvp inside finds itself nested, which it is
    try:
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True))
            found, spec = pytree.tree_flatten(function(*duals))
            ends = [forward_ad.unpack_dual(one) for one in found]
    finally:
        eager_transforms.JVP_NESTING -= 1
        _duals.reset(token)
    moved = [torch.zeros_like(end.primal) if end.tangent is None else end.tangent for end in ends]
    return pytree.tree_unflatten([end.primal for end in ends], spec), pytree.tree_unflatten(moved, spec)


_duals: ContextVar[bool] = ContextVar("duals", default=False)  # whether `_by_duals` is under way
_targets: ContextVar[bool] = ContextVar("targets", default=False)


def tangents_are_targets() -> bool:
    """Whether a `jvp` under way keeps the values' graph and wants none of its tangents."""
    return _targets.get()


def transforms() -> tuple[str, ...]:
    """The derivatives being taken here by forward mode ("Jvp") and torch.func ("Jvp", "Grad", "Vmap"), outermost first.

    Operators registered through torch.library have a rule for none: under forward mode their tangent is silently zero.
    Kernels ask here and answer with a rule of their own.
    """
    found = tuple(level.key().name for level in torch._C._functorch.get_interpreter_stack() or ())
    plain = forward_ad._current_level >= 0 and (_duals.get() or "Jvp" not in found)
    return ("Jvp", *found) if plain else found


def moves(x: Tensor) -> bool:
    """Whether it has a tangent here, or is what torch.func wraps such tensors in."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def unwrapped(x: Tensor) -> Tensor:
    """Its values without what torch.func wraps them in, in their graph. A tangent stays until its derivative ends."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def numbers(x: Tensor) -> list[int]:
    """The entries of integers [N]. torch 2.6 cannot read them at once where torch.func has wrapped them."""
    return [int(entry) for entry in x] if torch._C._functorch.is_functorch_wrapped_tensor(x) else x.tolist()


@functools.cache
def _load_forward_rules() -> None:
    """torch loads its rules at the first use, through torch.jit, and tells users that torch.jit is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


_MENDED = torch.__version__ < "2.14"  # asked once: it takes as long as a small layer


class _ContiguousGroupNorm(TorchFunctionMode):
    """Before torch 2.14 the forward rule of group_norm fails on channels-last inputs, as diffusers' attention makes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))
