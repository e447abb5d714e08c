"""Choose how a network's attention is computed: one diffusers processor around the stock one, per role.

The stock processor still projects, normalises, rotates and joins text tokens; what it hands to torch's
`scaled_dot_product_attention` goes to the chosen attention instead. So Wan, CogVideoX, PixArt, DiT, Flux and any other
model whose processors end there keep their own arithmetic, and all blocks on gives the stock result.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diffdistill.errors import UserError
from diffdistill.kernels.attention import api
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.operators import recorded_backends
from diffdistill.networks.block_sparse import BlockSparse, added
from diffdistill.networks.by_part import ByPart
from diffdistill.networks.call import Call, current_call
from diffdistill.networks.token_grid import GRIDS, announce, is_text, silence, telling


class Attention(Protocol):
    """A way to compute softmax(scale q k^T) v.  q, k, v: [B, H, N, D], out [B, H, N, D].

    layout: a block mask, for those that take one.  mask: the processor's own, bool (True: attend) or added to the
    logits, [B|1, H|1, N|1, N].  cross: whether it takes cross-attention too, which is left dense otherwise.
    """

    @property
    def cross(self) -> bool: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layout: BlockLayout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor: ...

    def ready(self) -> None:
        """Raise UserError if it cannot run on this machine."""

    def explain(self) -> str:
        """What runs, in words."""


@contextmanager
def _unfused() -> Iterator[None]:
    """torch's math backend, also under forward mode, whose own rule would take a fused kernel for the value."""
    with sdpa_kernel(SDPBackend.MATH), torch._C.DisableTorchFunction():
        yield


@dataclass(frozen=True)
class Sdpa:
    """torch's attention. fused: by the kernel it picks, else as single operations: more memory, but a rule for forward
    mode, which fused kernels lack."""

    fused: bool = True
    cross: bool = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layout: BlockLayout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        _no_layout(self, layout)
        with nullcontext() if self.fused else _unfused():
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def ready(self) -> None:
        pass

    def explain(self) -> str:
        kernel = "with the kernel it picks" if self.fused else "on its math kernel"
        return f"torch's scaled_dot_product_attention {kernel}"


@dataclass(frozen=True)
class Flex:
    """torch's compiled flex_attention, for inference; the first call of a shape compiles. No masks of tokens."""

    cross: bool = False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layout: BlockLayout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if mask is not None:
            raise UserError("attention", "must take the model's mask of tokens", "flex", "Use sdpa or math.")
        layout = BlockLayout.full(q.shape[2], k.shape[2], device=q.device) if layout is None else layout
        return api.block_sparse_attention(q, k, v, layout, scale, backend="flex")

    def ready(self) -> None:
        pass

    def explain(self) -> str:
        return "torch's flex_attention, compiled"


@dataclass(frozen=True)
class Xformers:
    """xformers' memory-efficient attention (an optional extra)."""

    cross: bool = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layout: BlockLayout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        _no_layout(self, layout)
        self.ready()
        ops = importlib.import_module("xformers.ops")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        bias = None if mask is None else added(mask, q.dtype).expand(*q.shape[:3], k.shape[2])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it takes [B, N, H, D]
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)

    def ready(self) -> None:
        reason = _why_no_xformers()
        if reason is not None:
            release = torch.__version__.partition("+")[0]
            fix = (
                f"Install the xformers release that was built for torch {release} (its release notes name the torch "
                "of each), pip install diffdistill[xformers], or use sdpa."
            )
            raise UserError("attention", "must be able to load its kernels", f"xformers: {reason}", fix)

    def explain(self) -> str:
        return "xformers' memory_efficient_attention"


sdpa, math, flex, xformers = Sdpa(), Sdpa(fused=False), Flex(), Xformers()


# -- on a network ---------------------------------------------------------------------------------------------


def set_attention(network: nn.Module, attention: Attention, roles: Sequence[str] | None = ("student",)) -> None:
    """Compute the attention of `network`'s diffusers modules by `attention` while one of `roles` calls it.

    roles: others, and calls outside every role, keep the stock processor; None: every call, as in a pipeline:
    `set_attention(pipe.transformer, BlockSparse(mask=ASA(density=0.2)), roles=None)`. A second call adds or replaces
    roles; `restore_attention` takes all away.
    Raises UserError if `attention` cannot run here, the network has no attention to set, or a mask needs a grid of
    tokens that is neither known of this network nor given.
    """
    if not callable(attention) or not hasattr(attention, "ready"):
        fix = "Give sdpa, math, flex, xformers or BlockSparse(...) of diffdistill.networks.attention."
        raise UserError("attention", "must be a value", repr(attention), fix)
    if isinstance(roles, str) or (roles is not None and not roles):
        raise UserError("roles", "must be names of roles, or None for every call", repr(roles), "Write ('student',).")
    attention.ready()
    sites = _sites(network)
    selves = [name for name, module in sites.items() if not _is_cross(name, module) and not is_text(network, name)]
    chosen = sites if attention.cross else {name: sites[name] for name in selves}
    if not chosen:
        raise UserError("network", "must have attention modules", type(network).__name__, "Set none on this one.")
    dense = tuple(getattr(attention, "dense_layers", ()))
    if any(not 0 <= index < len(selves) for index in dense):
        constraint = f"must be indices of the network's {len(selves)} self-attentions"
        raise UserError("dense_layers", constraint, list(dense), f"Give numbers from 0 to {len(selves) - 1}.")
    skipped = {selves[index] for index in dense}
    if isinstance(attention, BlockSparse) and attention.needs_grid:
        _announce_grid(network, chosen)
    for name, module in sites.items():
        if name in chosen and name not in skipped:
            _processor_of(module).by_role.update(dict.fromkeys(roles or (None,), attention))
        elif isinstance(module.processor, RoleAttention):  # what an earlier call gave these roles here
            for role in roles or (None,):
                module.processor.by_role.pop(role, None)


def restore_attention(network: nn.Module) -> None:
    """Give every attention module its stock processor back."""
    for module in _sites(network).values():
        if isinstance(module.processor, RoleAttention):
            module.set_processor(module.processor.stock)
    silence(network)


def explain(network: nn.Module) -> dict[str, dict[str, str]]:
    """Attention module -> role (`every call` for None) -> what runs; of the last call which one ran, under `ran`."""
    found = {}
    for name, module in _sites(network).items():
        processor = module.processor
        if isinstance(processor, RoleAttention):
            rows = {role or "every call": attention.explain() for role, attention in processor.by_role.items()}
            found[name] = {**rows, "ran": processor.ran}
    return found


class RoleAttention:
    """A diffusers attention processor: the stock one, its attention exchanged for the roles that ask for it.

    by_role: role -> attention; None: every call of a role without one.  ran: what the last call used.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.by_role: dict[str | None, Attention] = {}
        self.ran = "nothing yet"

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        attention = self._chosen(current_call())
        if attention is None:
            self.ran = "the stock processor"
            return self.stock(*args, **keywords)
        exchange = _Exchange(attention)
        with exchange, recorded_backends() as ran:
            out = self.stock(*args, **keywords)
        if not exchange.calls:
            constraint = "must replace torch's scaled_dot_product_attention, which this processor never calls"
            fix = "Give the module a processor that does (diffusers' ...2_0, its native attention backend)."
            raise UserError("attention", constraint, type(self.stock).__name__, fix)
        self.ran = f"{attention.explain()}: {', '.join(dict.fromkeys(ran))} ran" if ran else attention.explain()
        return out

    def _chosen(self, call: Call | None) -> Attention | None:
        """What attends in this call, None for the stock processor."""
        parts = (call,) if call is None else call.parts or (call,)
        found = [self.by_role.get(None if one is None else one.role, self.by_role.get(None)) for one in parts]
        if call is None or all(one is found[0] for one in found):
            return found[0]
        return ByPart(call, tuple(sdpa if one is None else one for one in found))


class _Exchange(TorchFunctionMode):
    """Within the context torch's fused attention is `attention`. calls: how often it was met."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention, self.calls = attention, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return _answer(self.attention, *args, **(kwargs or {}))


def _answer(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attention` on the arguments of torch's function."""
    if is_causal or dropout_p:
        found = "is_causal" if is_causal else f"dropout_p={dropout_p}"
        raise UserError("attention", "must be without causal masks and dropout", found, "Keep the stock processor.")
    return attention(query, key, value, scale=scale, mask=attn_mask)


@functools.cache
def _processor_class(stock: Any) -> type[RoleAttention]:
    """RoleAttention with the signature of a stock processor: diffusers drops keywords that it does not find in it."""

    @functools.wraps(stock.__call__)
    def call(self: RoleAttention, *args: Any, **keywords: Any) -> Any:
        return RoleAttention.__call__(self, *args, **keywords)

    return type(f"Role{stock.__name__}", (RoleAttention,), {"__call__": call})


def _processor_of(module: Any) -> RoleAttention:
    """The module's processor as ours, around the stock one if it is not yet."""
    if isinstance(module.processor, RoleAttention):
        return module.processor
    if isinstance(module.processor, nn.Module):
        fix = "Keep its stock attention."
        raise UserError("network", "must have processors without weights", type(module.processor).__name__, fix)
    ours = _processor_class(module.processor.__class__)(module.processor)
    module.set_processor(ours)
    return ours


def _sites(network: nn.Module) -> dict[str, Any]:
    """The modules with an attention processor, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "set_processor") and getattr(module, "processor", None) is not None
    }


def _is_cross(name: str, module: Any) -> bool:
    """Whether queries and keys come from different sequences: not of joint attention, which runs over both."""
    # LTX's modules do not say; a block's second attention is the one over text
    return bool(getattr(module, "is_cross_attention", name.rpartition(".")[2] == "attn2"))


def _announce_grid(network: nn.Module, sites: Iterable[str]) -> None:
    """Make the network's models tell their grid; refuse where a site lies in none of them."""
    inside = tuple(f"{name}." if name else "" for name in telling(network))
    lost = [site for site in sites if not site.startswith(inside)]
    if lost:
        constraint = f"must be given for models other than {', '.join(GRIDS)}"
        fix = "Give BlockSparse(mask=..., grid=Grid(frames, height, width))."
        raise UserError("grid", constraint, f"{type(network).__name__} with {lost[0]}", fix)
    announce(network)


def _no_layout(attention: Attention, layout: BlockLayout | None) -> None:
    if layout is not None:
        fix = "Use BlockSparse or flex."
        raise UserError("layout", "must be None for an attention without blocks", attention.explain(), fix)


@functools.cache
def _why_no_xformers() -> str | None:
    """Why xformers cannot run here, or None."""
    try:
        importlib.import_module("xformers")
        ops = importlib.import_module("xformers.ops")
        importlib.import_module("xformers._cpp_lib")._register_extensions()
    except Exception as error:  # a binary for another torch fails in many ways
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return None if hasattr(ops, "memory_efficient_attention") else "it has no memory_efficient_attention"
