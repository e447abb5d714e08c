"""Residual adapters on a frozen backbone that make one call answer as a guided pair of calls does.

block'(h) = block(h) + A(h; w, t, c), with A zero at first. A reads the guidance scale w, the output of the network's
own time embedding, and the class embedding or the prompt's tokens. They hang on modules as forward hooks: no module is
replaced, and taking the hooks away leaves the network as it was. AGD, arXiv:2503.07274.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.networks.call import Call, current_call, enter

AdapterKind = Literal["cross", "offset"]
MAX_POSITIONS = 250


@dataclass(frozen=True)
class AdapterSpec:
    """kind: cross attends from every token to (w, t, condition), offset adds one vector to all tokens.  width: of an
    adapter.  sites: regular expressions on names of modules whose output is one hidden state; None is every attention,
    or every block of a network without.
    """

    kind: AdapterKind = "cross"
    width: int = 64
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cross", "offset"):
            raise UserError("kind", "must be cross or offset", self.kind, "Cross for UNets, offset for DiTs.")
        if self.width < 2 or self.width % 2:
            raise UserError("width", "must be even and >= 2", self.width, "The paper: 320 and 256.")
        for site in self.sites or ():
            try:
                re.compile(site)
            except re.error as error:
                fix = f"{str(error).capitalize()}."
                raise UserError("sites", "must be regular expressions", repr(site), fix) from error


@dataclass(frozen=True)
class SiteShape:
    """What an adapter is built for: channels of the hidden state, of the time embedding, of the condition (0: none)."""

    channels: int
    time: int
    condition: int


class ScaleToken(nn.Module):
    """w [B] -> [B, width]: random Fourier features, whose frequencies are buffers and saved, and a small MLP."""

    frequency: Tensor
    phase: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.randn(width))
        self.register_buffer("phase", torch.rand(width))
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width)
        )

    def forward(self, w: Tensor) -> Tensor:
        angle = w.to(self.phase.dtype)[:, None] * self.frequency + self.phase
        return self.layers(torch.cos(2 * math.pi * angle))


class CrossAdapter(nn.Module):
    """softmax(q k^T / sqrt(width)) v from the tokens of h to (w, t, condition), one head; W_o is zero at first."""

    def __init__(self, shape: SiteShape, width: int) -> None:
        super().__init__()
        self.scale = ScaleToken(width)
        self.time = nn.Linear(shape.time, width)
        self.condition = nn.Linear(shape.condition, width) if shape.condition else None
        self.query = nn.Linear(shape.channels, width, bias=False)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, shape.channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, w: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        """tokens [B, T, C], w [B], time [B, d_t], condition [B, L, d_c] -> [B, T, C]."""
        read = [self.scale(w)[:, None], self.time(time)[:, None]]
        if self.condition is not None:
            assert condition is not None
            read.append(self.condition(condition))
        seen = torch.cat(read, 1)
        seen = seen + _positions(seen.shape[1], seen.shape[2]).to(seen)
        # written out: fused attention has no forward-mode rule
        logits = self.query(tokens) @ self.key(seen).transpose(1, 2) / math.sqrt(seen.shape[-1])
        return self.out(torch.softmax(logits, -1) @ self.value(seen))


class OffsetAdapter(nn.Module):
    """MLP(w + t + mean condition), one vector for all tokens; its last linear is zero at first."""

    def __init__(self, shape: SiteShape, width: int) -> None:
        super().__init__()
        self.scale = ScaleToken(width)
        self.time = nn.Linear(shape.time, width)
        self.condition = nn.Linear(shape.condition, width) if shape.condition else None
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))
        self.out = nn.Linear(width, shape.channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, w: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        """As CrossAdapter's; the result does not depend on the tokens."""
        summed = self.scale(w) + self.time(time)
        if self.condition is not None:
            assert condition is not None
            summed = summed + self.condition(condition.mean(1))
        return self.out(self.inner(summed))[:, None].expand_as(tokens)


class Adapters(nn.Module):
    """The adapters of one network, by site. shapes: site -> what it is built for."""

    def __init__(self, spec: AdapterSpec, shapes: Mapping[str, SiteShape]) -> None:
        super().__init__()
        self.spec, self.shapes = spec, dict(shapes)
        build: Callable[[SiteShape, int], nn.Module] = CrossAdapter if spec.kind == "cross" else OffsetAdapter
        self.sites = nn.ModuleDict({_key(name): build(shape, spec.width) for name, shape in shapes.items()})

    def hang(self, network: nn.Module, scale: Callable[[], Tensor | None]) -> Hooks:
        """Let the adapters act on `network`. scale: w [B] or [1] of the call in progress, None leaves it alone."""
        return Hooks(network, self, scale)

    def for_role(self, role: str) -> Callable[[], Tensor | None]:
        """The scale of this role's calls; other roles see the backbone alone."""

        def scale() -> Tensor | None:
            call = current_call()
            if call is None or call.role != role:
                return None
            if call.w is None:
                raise ValueError(f"role {role} has adapters that read w, but cond has no w [B].")
            return call.w

        return scale


class Hooks:
    """Adapters at work on a network, until `remove`."""

    def __init__(self, network: nn.Module, adapters: Adapters, scale: Callable[[], Tensor | None]) -> None:
        self.scale, self.time, self.condition = scale, None, None
        self._handles = [_time_embedding(network).register_forward_hook(self._keep("time"))]
        if (labels := _class_embedding(network)) is not None:
            self._handles.append(labels.register_forward_hook(self._keep("condition")))
        for name in adapters.shapes:
            adapter = adapters.sites[_key(name)]
            module = network.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._add(adapter), with_kwargs=True))

    def remove(self) -> None:
        """Take the adapters away; the network is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, what: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            setattr(self, what, output if isinstance(output, Tensor) else output[0])

        return hook

    def _add(self, adapter: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, keywords: Any, outputs: Any) -> Any:
            call = current_call()
            shared = call is not None and bool(call.parts)
            w = None if shared else self.scale()
            if w is None and not shared:
                return None
            place = _place(module, inputs, keywords, outputs)
            output = outputs if place is None else outputs[place]
            hidden = _hidden(inputs, keywords, output)
            condition = _prompt(inputs, keywords)
            if condition is None and self.condition is not None:
                condition = self.condition[:, None]

            def change(w: Tensor, rows: slice) -> Tensor:
                given = None if condition is None else condition[rows]
                assert self.time is not None
                return _change(adapter, hidden[rows], w, self.time.expand(len(hidden), -1)[rows], given, output[rows])

            def of_part(part: Call, rows: slice) -> Tensor | None:
                with enter(part):
                    w = self.scale()
                return None if w is None else change(w, rows)

            if w is not None:
                changed = output + change(w, slice(None))
            else:
                assert call is not None
                changed = call.added(output, of_part)
            return changed if place is None else (*outputs[:place], changed, *outputs[place + 1 :])

        return hook


def _change(
    adapter: nn.Module, hidden: Tensor, w: Tensor, time: Tensor, condition: Tensor | None, output: Tensor
) -> Tensor:
    """What an adapter adds to a site's output."""
    tokens, dtype = _tokens(hidden), next(adapter.parameters()).dtype
    given = None if condition is None else condition.to(dtype)
    w = w.expand(len(tokens)).to(tokens.device)
    found = adapter(tokens.to(dtype), w, time.to(dtype), given).to(output.dtype)
    return (found.transpose(1, 2) if output.ndim > 3 else found).reshape(output.shape)


def adapters_for(
    network: nn.Module, spec: AdapterSpec, call: Callable[[], Any], blocks: Sequence[str] = ()
) -> Adapters:
    """New adapters at the sites of `network`, built for the shapes seen in `call`, one forward pass of it.

    blocks: names of modules that take the place of attentions where there are none.
    """
    names = [name for name, module in network.named_modules() if _is_site(name, module, spec)]
    if not names and spec.sites is None:
        names = list(blocks)
    if not names:
        fix = "Name modules: adapter.sites=['mid_block']."
        raise UserError("adapter.sites", "must match a module, or the network have attention", spec.sites, fix)
    with _shapes(network, names) as shapes:
        call()
    return Adapters(spec, shapes)


@contextmanager
def _shapes(network: nn.Module, names: list[str]) -> Iterator[dict[str, SiteShape]]:
    """Filled by the forward pass made within the context."""
    found: dict[str, SiteShape] = {}
    widths = {"time": 0, "condition": 0}

    def keep(what: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            widths[what] = (output if isinstance(output, Tensor) else output[0]).shape[-1]

        return hook

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, keywords: Any, outputs: Any) -> None:
            place = _place(module, inputs, keywords, outputs)
            output = outputs if place is None else outputs[place]
            if not isinstance(output, Tensor) or output.ndim < 2:
                fix = "Name others: an attention, a residual block."
                raise UserError("adapter.sites", "must be modules that return one hidden state", name, fix)
            prompt = _prompt(inputs, keywords)
            width = widths["condition"] if prompt is None else prompt.shape[-1]
            channels = _tokens(_hidden(inputs, keywords, output)).shape[-1]
            found[name] = SiteShape(channels, widths["time"], width)

        return hook

    handles = [_time_embedding(network).register_forward_hook(keep("time"))]
    if (labels := _class_embedding(network)) is not None:
        handles.append(labels.register_forward_hook(keep("condition")))
    handles += [network.get_submodule(n).register_forward_hook(look(n), with_kwargs=True) for n in names]
    try:
        with torch.no_grad():
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_site(name: str, module: nn.Module, spec: AdapterSpec) -> bool:
    if spec.sites is not None:
        return any(re.fullmatch(site, name) for site in spec.sites)
    return type(module).__name__.endswith("Attention")  # diffusers': by name, this file works without it


def _time_embedding(network: nn.Module) -> nn.Module:
    found = _named(network, *TIME)
    if found is None:
        fix = "Adapters are for diffusers' UNets and transformers."
        raise UserError("roles", f"adapter needs a network with one of {TIME}", type(network).__name__, fix)
    return found


def _class_embedding(network: nn.Module) -> nn.Module | None:
    return _named(network, "class_embedding", "transformer_blocks.0.norm1.emb.class_embedder")


# where diffusers' models embed time; DiT does so once per block, all from the same input
TIME = ("time_embedding", "time_text_embed", "time_embed", "adaln_single", "condition_embedder.time_embedder",
        "timestep_proj", "transformer_blocks.0.norm1.emb.timestep_embedder")  # fmt: skip


def _named(network: nn.Module, *paths: str) -> nn.Module | None:
    for path in paths:
        with suppress(AttributeError):
            module: Any = network.get_submodule(path)
            if module is not None:
                return module
    return None


def _place(module: nn.Module, inputs: Any, keywords: Any, outputs: Any) -> int | None:
    """Where the hidden state lies in what a module returns: None for a tensor; in a tuple, the one of its input's
    shape. Where text is as long as the picture an attention returns the picture first; blocks differ."""
    if not isinstance(outputs, tuple):
        return None
    given = inputs[0] if inputs else keywords.get("hidden_states")
    shapes = [getattr(output, "shape", None) for output in outputs]
    if not isinstance(given, Tensor) or given.shape not in shapes:
        return None
    if shapes.count(given.shape) > 1 and not type(module).__name__.endswith("Attention"):
        constraint = "must be attentions where the text is as long as the picture"
        raise UserError(
            "adapter.sites", constraint, type(module).__name__, "Leave them out: attentions are the default."
        )
    return shapes.index(given.shape)


def _hidden(inputs: Any, keywords: Any, output: Tensor) -> Tensor:
    """What the site is asked about: its input, or its output where it changes their number or size."""
    given = inputs[0] if inputs else keywords.get("hidden_states")
    return given if isinstance(given, Tensor) and given.shape == output.shape else output


def _prompt(inputs: Any, keywords: Any) -> Tensor | None:
    """The tokens that a cross-attention reads, [B, L, d]."""
    given = keywords.get("encoder_hidden_states", inputs[1] if len(inputs) > 1 else None)
    return given if isinstance(given, Tensor) and given.ndim == 3 else None


def _tokens(hidden: Tensor) -> Tensor:
    """[B, C, *space], [B, T, C] or [B, C] as [B, T, C]."""
    if hidden.ndim == 2:
        return hidden[:, None]
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim > 3 else hidden


def _positions(length: int, width: int) -> Tensor:
    """Sinusoidal positions [length, width]; from 250 on the last one repeats."""
    place = torch.arange(length).clamp(max=MAX_POSITIONS - 1).float()
    power = torch.arange(0, width, 2) / width
    angle = place[:, None] * torch.exp(-math.log(10_000.0) * power)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ModuleDict's keys may not contain dots
