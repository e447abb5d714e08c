"""Forward-mode rules of common layers whose weights have no tangent.

torch's own give every operand a tangent, zeros where there are none, and then ask Python for the shape of each sum with
such zeros: a tenth of a millisecond per sum, and a convolution or a product more. Here the tangent alone passes through
the layer. Values and tangents are torch's up to rounding. Values keep their graph where gradients are enabled, tangents
have none: they are targets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Rule = Callable[..., Any]

# the Jacobian of x -> (x - mean) rstd is symmetric: its product with a tangent is what the backward pass computes
_backward = torch.ops.aten
_INPUT = [True, False, False]  # of the gradients, the input's alone
_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# value and tangent of a tensor, and a tensor of the two: what forward_ad.unpack_dual and make_dual come to at the one
# level there is, without their questions, which take longer than most layers
_taken: Callable[[Tensor], tuple[Tensor, Tensor | None]] = partial(torch._VF._unpack_dual, level=0)
_given: Callable[[Tensor, Tensor], Tensor] = partial(torch._VF._make_dual, level=0)


def _dual(operand: Any) -> tuple[Any, Tensor | None]:
    """A tensor's value and tangent; numbers and parameters, which are never made of the two, have none."""
    if not isinstance(operand, Tensor) or type(operand) is nn.Parameter:
        return operand, None
    return _taken(operand)


def _moves(*others: Any) -> bool:
    """Whether any of these has a tangent: then torch's own rule is right."""
    return any(_dual(x)[1] is not None for x in others)


def layer(function: Rule) -> Rule:
    """The rule of what is linear in its input and adds a bias."""

    def rule(input: Tensor, weight: Tensor, bias: Tensor | None = None, *others: Any, **named: Any) -> Any:
        x, moved = _taken(input)
        if moved is None or _moves(weight, bias):
            return NotImplemented
        value = function(x, weight, bias, *others, **named)
        with torch.no_grad():
            tangent = function(moved, weight, None, *others, **named)
        return _given(value, tangent)

    return rule


def _left_to_torch(x: Tensor) -> bool:
    """Autocast has a choice of dtype for norms; tensors without values have no autocast that could be asked."""
    return x.is_meta or torch.is_autocast_enabled(x.device.type)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    x, moved = _taken(input)
    if moved is None or _moves(weight, bias) or _left_to_torch(x):
        return NotImplemented
    x, moved = x.contiguous(), moved.contiguous()
    sizes = (len(x), x.shape[1], x[0, 0].numel(), num_groups)
    value, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
    with torch.no_grad():
        tangent = _backward.native_group_norm_backward(moved, x, mean, rstd, None, *sizes, _INPUT)[0]
        scaled = tangent if weight is None else tangent * weight.view(-1, *[1] * (x.ndim - 2))
    return _given(value, scaled)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    x, moved = _taken(input)
    if moved is None or len(normalized_shape) != 1 or _moves(weight, bias) or _left_to_torch(x):
        return NotImplemented
    value, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    with torch.no_grad():
        tangent = _backward.native_layer_norm_backward(moved, x, normalized_shape, mean, rstd, None, None, _INPUT)[0]
        scaled = tangent if weight is None else tangent * weight
    return _given(value, scaled)


def _activation(function: Rule, derivative: Rule) -> Rule:
    """derivative: what the backward pass computes of a gradient and x, which is as well the product with a tangent."""

    def rule(input: Tensor, inplace: bool = False, **named: Any) -> Any:
        x, moved = _taken(input)
        if moved is None or inplace:
            return NotImplemented
        with torch.no_grad():
            tangent = derivative(moved, x, **named)
        return _given(function(x, **named), tangent)

    return rule


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *others: Any, scale: float | None = None, **named: Any
) -> Any:
    """Without masks and dropout. Fused kernels have no rule, but their values have a graph of little memory."""
    (q, dq), (k, dk), (v, dv) = (_taken(x) for x in (query, key, value))
    asked = [x for x in (*others, *named.values()) if isinstance(x, Tensor) or x]
    if all(moved is None for moved in (dq, dk, dv)) or asked or _left_to_torch(q):
        return NotImplemented
    scale, graph = q.shape[-1] ** -0.5 if scale is None else scale, torch.is_grad_enabled()
    with torch.no_grad():
        shares = (scale * q @ k.mT).softmax(-1)
        parts = [] if dv is None else [shares @ dv]
        slopes = [scale * one @ other.mT for one, other in ((dq, k), (q, dk)) if one is not None and other is not None]
        if slopes:
            slope = sum(slopes[1:], slopes[0])
            parts.append((shares * (slope - (shares * slope).sum(-1, keepdim=True))) @ v)
        tangent, out = sum(parts[1:], parts[0]), None if graph else shares @ v
    if out is None:
        with sdpa_kernel(_FUSED):
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return _given(out, tangent)


def _of_one(rule: Callable[[Any, Any, Tensor | None, Tensor | None, Tensor], Tensor], function: Rule) -> Rule:
    """A function of two operands, tensors or numbers, of which one alone has a tangent."""

    def of_two(one: Any, other: Any, *others: Any, **named: Any) -> Any:
        if others or named:
            return NotImplemented
        (x, dx), (y, dy) = _dual(one), _dual(other)
        if (dx is None) == (dy is None):
            return NotImplemented
        value = function(x, y)
        graph = any(one is not None and one.requires_grad for one in (value, dx, dy))
        with torch.no_grad() if graph else nullcontext():  # entering the former is half of such an operation
            tangent = rule(x, y, dx, dy, value)
            if tangent.shape != value.shape or tangent.dtype != value.dtype:
                tangent = tangent.to(value.dtype).expand(value.shape).contiguous()
        return _given(value, tangent)

    return of_two


def _sum(x: Any, y: Any, dx: Tensor | None, dy: Tensor | None, value: Tensor) -> Tensor:
    return (dx if dx is not None else dy).clone()  # type: ignore[union-attr]  # for what is done in place to the sum


def _difference(x: Any, y: Any, dx: Tensor | None, dy: Tensor | None, value: Tensor) -> Tensor:
    return dx.clone() if dx is not None else -dy  # type: ignore[operator]


def _product(x: Any, y: Any, dx: Tensor | None, dy: Tensor | None, value: Tensor) -> Tensor:
    return dx * y if dx is not None else x * dy


def _quotient(x: Any, y: Any, dx: Tensor | None, dy: Tensor | None, value: Tensor) -> Tensor:
    return dx / y if dx is not None else -(value / y) * dy


def _hypotenuse(x: Any, y: Any, dx: Tensor | None, dy: Tensor | None, value: Tensor) -> Tensor:
    return x * dx / value if dx is not None else y * dy / value


def _angle(y: Any, x: Any, dy: Tensor | None, dx: Tensor | None, value: Tensor) -> Tensor:
    return (x * dy if dy is not None else -y * dx) / (x * x + y * y)


RULES: dict[Any, Rule] = {
    F.linear: layer(F.linear),
    F.conv1d: layer(F.conv1d),
    F.conv2d: layer(F.conv2d),
    F.conv3d: layer(F.conv3d),
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.silu: _activation(F.silu, _backward.silu_backward),
    F.gelu: _activation(F.gelu, _backward.gelu_backward),
    F.scaled_dot_product_attention: _attention,
    torch.hypot: _of_one(_hypotenuse, torch.hypot),
    torch.atan2: _of_one(_angle, torch.atan2),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _of_one(_sum, torch.add)),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _of_one(_difference, torch.sub)),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _of_one(_product, torch.mul)),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _of_one(_quotient, torch.div)),
}


class Rules(TorchFunctionMode):
    """Within the context, that of one derivative, these rules hold, where they apply: not inside a transform of
    torch.func there, such as another derivative, for which torch has no rules of what they are made of."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        if rule is not None and torch._C._functorch.peek_interpreter_stack() is None:
            found = rule(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))
