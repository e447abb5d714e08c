"""Runs training steps on the meta device as they would run on a GPU: what autocast makes of types, what a fused
attention keeps, and what every operator holds and computes; no value is ever there.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffdistill.autodiff import transforms
from diffdistill.networks.call import current_call

ACTIVATIONS = "activations"
GRADIENTS = "gradients"

# CUDA's autocast by the names of torch's functions (ATen/autocast_mode.h): what runs in bfloat16, and what in float32
LOWERED = frozenset(
    {
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu",
        "matmul", "__matmul__", "__rmatmul__", "einsum", "mm", "mv", "bmm", "addmm", "addmv", "addr", "addbmm",
        "baddbmm", "chain_matmul", "scaled_dot_product_attention",
    }
)  # fmt: skip
RAISED = frozenset(
    {
        "exp", "expm1", "log", "log2", "log10", "log1p", "reciprocal", "rsqrt", "pow", "__pow__", "__rpow__",
        "softplus", "layer_norm", "group_norm", "rms_norm", "cosine_similarity", "nll_loss", "l1_loss",
        "smooth_l1_loss", "huber_loss", "mse_loss", "kl_div", "binary_cross_entropy_with_logits", "logsumexp",
        "interpolate", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "norm", "sum", "dist", "cdist",
    }
)  # fmt: skip


@dataclass
class Passing:
    """above: bytes of activations at its peak beyond those before it.  flops: floating-point operations."""

    above: float = 0.0
    flops: int = 0


class Ledger(TorchDispatchMode):
    """Within the context: bytes of live storages by kind, their peak, and floating-point operations.

    held: tensors there at entry, by kind; whatever is made since is an activation, a gradient once it is a weight's.
    shares: kind -> number of devices it is spread over, 1 where it is not named; the peak is one device's.
    """

    def __init__(self, held: Mapping[str, Iterable[Tensor]], shares: Mapping[str, int]) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self.flops = 0
        self.without_gradient = 0  # of these, in remembered networks' calls
        self.sketching = False
        self._shares, self._kinds = dict(shares), dict[int, str]()
        self._most = -1.0
        for kind, tensors in held.items():
            for tensor in tensors:
                self._add(tensor, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func)
        out = rule(*args) if rule is not None and args[0].is_meta and not kwargs else None
        if out is None:
            out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._add(out, ACTIVATIONS)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._add(leaf, ACTIVATIONS)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def is_gradient(self, weight: Tensor) -> None:
        """A hook for after a weight's gradient is there."""
        if weight.grad is None:
            return
        storage = weight.grad.untyped_storage()
        if self._kinds.get(id(storage)) == ACTIVATIONS:
            self._move(storage, GRADIENTS)

    @contextmanager
    def aside(self) -> Iterator[Passing]:
        """Within the context the peak is looked at alone; the yielded record then has it above what was live."""
        most, peak, start, flops = self._most, self.peak, dict(self.bytes), self.flops
        self._most, self.peak = -1.0, {}
        self._change(ACTIVATIONS, 0)
        passing = Passing()
        yield passing
        passing.flops = self.flops - flops
        passing.above = self.peak.get(ACTIVATIONS, 0.0) - start.get(ACTIVATIONS, 0.0)
        if most >= self._most:
            self._most, self.peak = most, peak

    def again(self, passing: Passing) -> None:
        """What was looked at aside happens once more."""
        self.flops += passing.flops
        self._change(ACTIVATIONS, passing.above)
        self._change(ACTIVATIONS, -passing.above)

    def _add(self, tensor: Tensor, kind: str) -> None:
        if not tensor.is_meta:  # draws, before they are moved to the device
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._kinds:
            return
        self._kinds[key] = kind
        self._change(kind, size)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _move(self, storage: Any, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._change(self._kinds[key], -size)
        self._kinds[key] = kind
        self._change(kind, size)

    def _drop(self, key: int, size: int) -> None:
        self._change(self._kinds.pop(key), -size)

    def _change(self, kind: str, size: float) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0.0) + size / self._shares.get(kind, 1)
        total = sum(self.bytes.values())
        if total > self._most:
            self._most, self.peak = total, dict(self.bytes)


def _pointwise(x: Tensor, other: Any = None, *rest: Any) -> Tensor:
    if not isinstance(other, Tensor) or (x.shape == other.shape and x.dtype == other.dtype):
        return torch.empty_like(x)
    shape = x.shape if not other.dim() else torch.broadcast_shapes(x.shape, other.shape)
    return x.new_empty(shape, dtype=torch.result_type(x, other))


def _normed(x: Tensor, shape: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _group_normed(
    x: Tensor, weight: Any, bias: Any, samples: int, channels: int, size: int, groups: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (samples, groups)
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _gradients(x: Tensor, weight: Any, bias: Any, wanted: Any) -> tuple[Tensor | None, ...]:
    found = (x, weight, bias)
    return tuple(
        torch.empty_like(one) if ask and one is not None else None for one, ask in zip(found, wanted, strict=True)
    )


def _layer_norm_backward(
    gradient: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, weight: Any, bias: Any, wanted: Any
) -> tuple[Tensor | None, ...]:
    return _gradients(x, weight, bias, wanted)


def _group_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any, samples: int, channels: int, size: int,
    groups: int, wanted: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return _gradients(x, weight, weight, wanted)


def _norm_of_all(x: Tensor, order: Any = 2, dim: Any = None, *rest: Any) -> Tensor | None:
    return x.new_empty(()) if dim is None else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _shifted_product(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


# the shapes of what is run most: torch finds them by tracing its own reference implementations, 50 times as slowly
_aten = torch.ops.aten
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.silu.default,
            _aten.gelu.default, _aten.silu_backward.default, _aten.gelu_backward.default,
        ),
        _pointwise,
    ),
    _aten.linalg_vector_norm.default: _norm_of_all,
    _aten.mm.default: _product,
    _aten.addmm.default: _shifted_product,
    _aten.native_layer_norm.default: _normed,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.native_group_norm.default: _group_normed,
    _aten.native_group_norm_backward.default: _group_norm_backward,
}  # fmt: skip


VALUES: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.__bool__: bool,
    Tensor.item: Tensor.item,
    Tensor.tolist: Tensor.tolist,
    Tensor.cpu: Tensor.cpu,
}


class OnAGpu(TorchFunctionMode):
    """Within the context, torch's functions on the meta device do what they do on a GPU.

    lowered: whether autocast to bfloat16 is on.  ledger: told of the attention's operations.  What asks a tensor for
    its values hears ones: they steer nothing but checks and histograms.
    """

    def __init__(self, ledger: Ledger, lowered: bool) -> None:
        super().__init__()
        self.ledger, self.lowered = ledger, lowered
        self._cast: dict[int, Tensor] = {}  # autocast keeps one copy of a trained weight per context

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in VALUES and args[0].is_meta:
            return VALUES[func](torch.ones(args[0].shape, dtype=args[0].dtype))
        name = getattr(func, "__name__", "")
        if self.lowered and name in LOWERED:
            args, kwargs = _each(self._lower, args, kwargs)
        elif self.lowered and name in RAISED:
            args, kwargs = _each(_raise, args, kwargs)
        if func is F.scaled_dot_product_attention and torch.backends.cuda.flash_sdp_enabled():
            return _attend(self.ledger, *args, **kwargs)
        return func(*args, **kwargs)

    def forget(self) -> None:
        """Autocast ends: its copies of weights go."""
        self._cast.clear()

    def _lower(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.requires_grad and x.is_leaf):
            return x.to(torch.bfloat16)
        if id(x) not in self._cast:
            self._cast[id(x)] = x.to(torch.bfloat16)
        return self._cast[id(x)]


def _each(cast: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with their tensors cast; einsum takes them in a list."""
    return (
        tuple([cast(y) for y in x] if isinstance(x, list) else cast(x) for x in args),
        {name: cast(x) for name, x in kwargs.items()},
    )


def _raise(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


def _attend(ledger: Ledger, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Attention [B, H, N, D] by a fused kernel: it keeps its inputs, its output and a number per row.

    What else it is told (mask, causality, scale) changes no size; a mask is the caller's own.
    """
    return _Fused.apply(ledger, query, key, value)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ledger: Ledger, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        *outer, heads, rows, _ = q.shape
        out = q.new_empty(*outer, rows, heads, v.shape[-1]).transpose(-3, -2)  # tokens first, as kernels write it
        per_row = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, per_row)
        ctx.ledger = ledger
        ctx.product = q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        ledger.flops += 2 * ctx.product  # two products of matrices
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        ctx.ledger.flops += 5 * ctx.product  # five, of which one repeats the scores
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Sketched(torch.autograd.Function):
    """A network call of which only the shape of its result is known; gradients reach what they would reach."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, dtype: torch.dtype, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(torch.empty_like(x) for x in ctx.saved_tensors)


def remembered(network: Any, ledger: Ledger) -> None:
    """From now on, calls of `network` without gradients run once for each role and shape; then their costs are added.

    While the ledger is sketching, no call runs whose shape is known. Calls whose blocks are recorded, and those that
    carry tangents, run as they are.
    """
    seen: dict[Any, Passing] = {}
    shapes: dict[Any, tuple[torch.Size, torch.dtype]] = {}
    forward, blocks = network.forward, list(network.blocks)

    def call(x: Tensor, t_net: Tensor, cond: Any) -> Tensor:
        now, grad = current_call(), torch.is_grad_enabled()
        key = (id(network), now and now.role, x.shape, x.dtype, tuple(sorted(cond)))
        if any(block._forward_hooks for block in blocks) or transforms():
            return forward(x, t_net, cond)
        if grad and ledger.sketching and key in shapes:
            weight = next((weight for weight in network.parameters() if weight.requires_grad), None)
            return _Sketched.apply(*shapes[key], x, *(() if weight is None else (weight,)))
        if grad or key not in seen:
            with nullcontext(Passing()) if grad else ledger.aside() as passing:
                out: Tensor = forward(x, t_net, cond)
            shapes[key] = out.shape, out.dtype
            if not grad:
                seen[key] = passing
                ledger.without_gradient += passing.flops
            return out
        ledger.again(seen[key])
        ledger.without_gradient += seen[key].flops
        return x.new_empty(shapes[key][0], dtype=shapes[key][1])

    network.forward = call


def filled(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer on the meta device the state it has after its first step, and make its steps free: a fused one
    needs no room beside. What its state is, one small real weight tells.
    """
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.zeros(3)
    like = copy.copy(optimizer)
    like.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    like.state = defaultdict(dict)
    like.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in like.state[weight].items():
                whole = isinstance(value, Tensor) and value.shape == weight.shape
                optimizer.state[parameter][name] = torch.zeros_like(parameter) if whole else value
    optimizer.step = _no_step  # type: ignore[method-assign, assignment]


def _no_step(closure: Any = None) -> None:
    pass
