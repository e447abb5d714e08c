"""Views of a network: Denoiser, FlowMap, SignalMap and the value Guidance. Views own no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from diffdistill.autodiff import moves, transforms
from diffdistill.errors import UserError
from diffdistill.networks.call import Ask, asked, current_call
from diffdistill.networks.joined import Question, answers
from diffdistill.process import VELOCITY, X0, Kind, NoiseProcess, expand

Cond = Mapping[str, Tensor]  # batch first; a null condition has batch 1 and is expanded


class Network(Protocol):
    """A raw prediction with its process and kind. blocks: the modules to shard, checkpoint and record."""

    process: NoiseProcess
    kind: Kind

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    def scale(self, t: Tensor) -> Tensor:
        """c_in: what the state is multiplied with, [B]."""
        ...

    def time(self, t: Tensor) -> Tensor:
        """What the time embedding is fed, [B]."""
        ...

    def __call__(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance as a value: D_null + scale (D_c - D_null). Ho & Salimans 2022, arXiv:2207.12598.

    scale: w; 1 is the conditional model, everywhere. A tensor [B] gives each sample its own.
    null: the unconditional (or negative) condition, batch 1.
    interval: (low, high) times of the process outside which w = 1 (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    """

    scale: float | Tensor
    null: Cond
    interval: tuple[float, float] | None = None

    @property
    def is_identity(self) -> bool:
        return not isinstance(self.scale, Tensor) and self.scale == 1

    @property
    def is_unconditional(self) -> bool:
        """w = 0 at all times: the null condition alone, one pass."""
        return not isinstance(self.scale, Tensor) and self.scale == 0 and self.interval is None

    @property
    def passes(self) -> int:
        """Network calls of one guided call."""
        return 1 if self.is_identity or self.is_unconditional else 2

    def weight(self, t: Tensor) -> Tensor:
        """w for each sample, [B]."""
        w = torch.as_tensor(self.scale, dtype=t.dtype, device=t.device).expand_as(t)
        if self.interval is None:
            return w
        low, high = self.interval
        return torch.where((t >= low) & (t <= high), w, torch.ones_like(w))


def unconditioned(cond: Cond, null: Cond, x: Tensor) -> Cond:
    """`cond` with the null condition in its place for each of x [B, ...]; keys that null lacks stay."""
    return {**cond, **{key: value.to(x.device).expand(len(x), *value.shape[1:]) for key, value in null.items()}}


# what `Denoiser.record` is adding to, by role
_recordings: ContextVar[tuple[tuple[str, dict[int, list[Tensor]]], ...]] = ContextVar("recordings", default=())


class _EarlyStop(Exception):
    """Raised by the last recorded block: the rest of the network is not needed."""


def first_tensor(output: Any) -> Tensor:
    """A block's hidden state: its output, or the first element where it returns more (residuals of a UNet)."""
    return output if isinstance(output, Tensor) else first_tensor(output[0])


@dataclass(frozen=True)
class Denoiser:
    """E[x0 | x_t, cond] through a network.

    network: raw prediction.  role: whose weights run.  guidance: None is the plain conditional model.
    inputs: (name, value) of extra inputs that calls need not give.  together: what it asks may share a network
    call: the two questions of guidance, and in `denoised` those of views over one network.
    """

    network: Network
    role: str = "teacher"
    guidance: Guidance | None = None
    inputs: tuple[tuple[str, float], ...] = ()
    together: bool = False
    _under: list[tuple[NoiseProcess, Denoiser]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def process(self) -> NoiseProcess:
        return self.network.process

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D(x_t, t, cond), [B, *shape]; t [B] in times of `process`, float32 or wider."""
        return self.predict(x_t, t, cond, X0)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What a generator takes for the clean sample: D itself."""
        return self(x_t, t, cond)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond, kind: Kind) -> Tensor:
        """The prediction at (x_t, t) as `kind`, [B, *shape], guided if the view is."""
        raw = self._raw(answers(self._questions(x_t, t, cond)), t)
        return self.process.convert(raw, x_t, t, self.network.kind, kind)

    def predict_at(self, x: Tensor, t_state: Tensor, t: Tensor, cond: Cond, kind: Kind) -> Tensor:
        """As `predict`, but the state x lies at t_state while the time embedding is fed t (BOOT's signal map)."""
        raw = self._question(x, t_state, t, cond).answer()
        return self.process.convert(raw, x, t_state, self.network.kind, kind)

    def guided(self, guidance: Guidance | None) -> Denoiser:
        """This denoiser under `guidance`; w == 1 is the plain model and costs no second pass."""
        return replace(self, guidance=None if guidance is None or guidance.is_identity else guidance)

    def given(self, **inputs: float) -> Denoiser:
        """This denoiser with values for extra inputs (w, s, step) that its callers leave out."""
        return replace(self, inputs=tuple({**dict(self.inputs), **inputs}.items()))

    def under(self, process: NoiseProcess) -> Denoiser:
        """The same network seen in another process, clipped to the noise levels the network covers.

        The kind stays: its row is taken in the source process at the source time, where x0 and eps are the same.
        """
        if not self._under or self._under[0][0] != process:  # methods ask for the same one at every step
            self._under[:] = [(process, self._changed_to(process))]
        return self._under[0][1]

    def _changed_to(self, process: NoiseProcess) -> Denoiser:
        network = _Changed(self.network, process.clipped_to(self.process))
        guidance = self.guidance
        if guidance is not None and guidance.interval is not None:
            ends = self.process.angle(torch.tensor(guidance.interval, dtype=torch.float64))
            low, high = network.process.time_at(ends).tolist()
            guidance = replace(guidance, interval=(low, high))
        return replace(self, network=network, guidance=guidance)

    @contextmanager
    def record(self, layers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
        """Within the context every call of this view also stores the outputs of blocks `layers`, with no extra pass.

        Yields a dict from layer to its features [B, ...], one list entry per question to the network, of a guided pair
        the conditional one first.
        """
        with self._hooked(layers, stop=False) as features:
            token = _recordings.set((*_recordings.get(), (self.role, features)))
            try:
                yield features
            finally:
                _recordings.reset(token)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[int]) -> list[Tensor]:
        """Outputs of blocks `layers` at (x_t, t) without guidance; the network stops after the last of them."""

        def recorded(x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
            with self._hooked(layers, stop=True) as features, suppress(_EarlyStop):
                self._question(x_t, t, t, cond).answer()
            return [features[layer][0] for layer in layers]

        return asked(Ask(self.role, recorded, (x_t, t, cond), x_t, tuple(layers)))

    @contextmanager
    def _hooked(self, layers: Sequence[int], stop: bool) -> Iterator[dict[int, list[Tensor]]]:
        blocks = self.network.blocks
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        if not layers or not all(0 <= layer < len(blocks) for layer in layers):
            raise UserError(
                "layers", f"must be indices of the network's {len(blocks)} blocks", list(layers), "Choose among them."
            )

        hidden = getattr(self.network, "hidden", first_tensor)  # where text and picture have a stream each

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                call = current_call()
                mine = [] if call is None else call.of(self.role, hidden(output))
                found[layer].extend(mine)
                if mine and stop and layer == max(layers):
                    raise _EarlyStop

            return hook

        handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in found]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code does not run hooks added after it
                yield found
        finally:
            for handle in handles:
                handle.remove()

    def _questions(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Question]:
        """What the network is asked for one prediction: with guidance under the condition and without."""
        if self.guidance is None:
            return [self._question(x_t, t, t, cond)]
        without = unconditioned(cond, self.guidance.null, x_t)
        conds = (without,) if self.guidance.is_unconditional else (cond, without)
        return [self._question(x_t, t, t, one) for one in conds]

    def _raw(self, found: Sequence[Tensor], t: Tensor) -> Tensor:
        """The raw prediction from the answers to `_questions`."""
        if len(found) == 1:
            return found[0]
        # every kind is affine in D with the same x_t term, so guiding the raw prediction guides D
        assert self.guidance is not None
        conditional, unconditional = found
        return unconditional + expand(self.guidance.weight(t), conditional) * (conditional - unconditional)

    def _question(self, x: Tensor, t_state: Tensor, t: Tensor, cond: Cond) -> Question:
        x_in = (expand(self.network.scale(t_state), x) * x).to(x.dtype)
        missing = {name: torch.full_like(t, value) for name, value in self.inputs if name not in cond}
        cond = {**cond, **missing} if missing else cond
        s = self.network.time(cond["s"]) if "s" in cond else None
        inputs = (x_in, self.network.time(t), t, s, cond)
        recordings = tuple(found for role, found in _recordings.get() if role == self.role)
        return Question(self.role, self.network, x, t_state, inputs, self.together, recordings)


def denoised(denoisers: Sequence[Denoiser], x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """D(x_t, t, cond) of each, [B, *shape]: in one network call where they are views of one network and `together`."""
    if not any(
        denoiser.together for denoiser in denoisers
    ):  # one by one: gradients are summed in the order of the views
        return [denoiser(x_t, t, cond) for denoiser in denoisers]
    questions = [denoiser._questions(x_t, t, cond) for denoiser in denoisers]
    found = iter(answers([question for asked in questions for question in asked]))
    raw = [view._raw([next(found) for _ in own], t) for view, own in zip(denoisers, questions, strict=True)]
    return [view.process.convert(r, x_t, t, view.network.kind, X0) for view, r in zip(denoisers, raw, strict=True)]


class _Match:
    """`process.match(source, t)`, kept for the last t: a call of a network asks for the same one four times."""

    def __init__(self, process: NoiseProcess, source: NoiseProcess) -> None:
        self.process, self.source = process, source
        self._last: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        inside = bool(transforms())
        moved = inside and moves(t)
        # what is made under a derivative of something else, or for inference, is of no use outside; nor is a graph
        if t.requires_grad or t.is_inference() or torch.is_inference_mode_enabled() or (inside and not moved):
            return self.process.match(self.source, t)
        version = 0 if moved else t._version
        if self._last is None or self._last[0] is not t or self._last[1] != version:
            self._last = (t, version, self.process.match(self.source, t))
        return self._last[2]


@dataclass(frozen=True)
class _ChangedKind(Kind):
    """A kind whose row is taken in the source process, at the source time."""

    kind: Kind
    source: NoiseProcess
    match: _Match = field(compare=False)

    @property
    def ends_at_t_min(self) -> bool:  # type: ignore[override]
        return self.kind.ends_at_t_min

    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.kind.row(self.source, self._matched(process, t)[0])

    def x0_from(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        t_source, factor = self._matched(process, t)
        c_x, c_pred = self.kind.x0_from(self.source, t_source)
        return c_x * factor, c_pred

    def _matched(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.match(t) if process == self.match.process else process.match(self.source, t)


class _Changed:
    """A network seen in another process: state and time are matched, then the network runs as it is."""

    def __init__(self, network: Network, process: NoiseProcess) -> None:
        self.hidden = getattr(network, "hidden", first_tensor)
        self.network, self.process = network, process
        self.unchanged = getattr(network, "unchanged", network)  # the network that runs, as it is
        self.match = _Match(process, network.process)
        self.kind: Kind = _ChangedKind(network.kind, network.process, self.match)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.network.blocks

    def scale(self, t: Tensor) -> Tensor:
        t_source, factor = self.match(t)
        return self.network.scale(t_source) * factor

    def time(self, t: Tensor) -> Tensor:
        return self.network.time(self.match(t)[0])

    def __call__(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        return self.network(x, t_net, cond)


Head = Literal["consistency", "jump", "average"]


@dataclass(frozen=True)
class FlowMap:
    """A map along the PF-ODE, (x_t, t, s) -> x_s, read off a denoiser by one of three heads.

    consistency: to t_min only, with f(x, t_min) = x exactly (Song et al. 2023, arXiv:2303.01469).
    jump: one DDIM step with the predicted x0; the network needs no input s.
    average: x_t - (t - s) u(x_t, t, s), u the network's velocity with s as an extra input (Geng et al. 2025,
    arXiv:2505.13447).
    """

    denoiser: Denoiser
    head: Head

    def __post_init__(self) -> None:
        if self.head not in ("consistency", "jump", "average"):
            raise UserError("head", "must be consistency, jump or average", self.head, "Choose one of them.")

    @property
    def process(self) -> NoiseProcess:
        return self.denoiser.process

    @property
    def role(self) -> str:
        return self.denoiser.role

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x_s, [B, *shape]. t >= s, each [B]; the consistency head ends at t_min whatever s says below it."""
        if self.head == "average":
            return x_t - expand(t - s, x_t) * self._velocity(x_t, t, s, cond)
        if self.head == "consistency":
            s = torch.full_like(t, self.process.t_min)
        return self._land(x_t, self.denoiser(x_t, t, cond), t, s)

    def average_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """u with x_s = x_t - (t - s) u, [B, *shape]; at s == t the PF-ODE velocity."""
        if self.head == "average":
            return self._velocity(x_t, t, s, cond)
        x0 = self.denoiser(x_t, t, cond)
        if self.head == "consistency":
            s = torch.full_like(t, self.process.t_min)
        still = t == s
        span = torch.where(still, torch.ones_like(t), t - s)
        moved = (x_t - self._land(x_t, x0, t, s)) / expand(span, x_t)
        velocity = self.process.convert(x0, x_t, t, X0, VELOCITY)
        return torch.where(still.view(-1, *[1] * (x_t.ndim - 1)), velocity, moved)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The end of the map, at t_min."""
        return self(x_t, t, torch.full_like(t, self.process.t_min), cond)

    def _land(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s from the predicted x0; a kind with boundary scalings already ends at t_min."""
        if self.head == "consistency" and self.denoiser.network.kind.ends_at_t_min:
            return x0
        return self.process.jump(x_t, x0, t, s)

    def _velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        return self.denoiser.predict(x_t, t, {**cond, "s": s}, VELOCITY)


@dataclass(frozen=True)
class SignalMap:
    """BOOT's y(z, t): the signal part of the trajectory that starts at noise z. Gu et al. 2023, arXiv:2306.05544.

    The image input is always the prior, sigma(t_max) z; t only feeds the time embedding.
    """

    denoiser: Denoiser

    @property
    def process(self) -> NoiseProcess:
        return self.denoiser.process

    @property
    def role(self) -> str:
        return self.denoiser.role

    def __call__(self, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """y, [B, *shape], from unit noise z [B, *shape] and trajectory time t [B]."""
        t_max = torch.full_like(t, self.process.t_max)
        prior = expand(self.process.alpha_sigma(t_max)[1], z) * z
        return self.denoiser.predict_at(prior, t_max, t, cond, X0)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The clean end of the trajectory whose prior is x_t (which must lie at t_max)."""
        t_max = torch.full_like(t, self.process.t_max)
        z = x_t / expand(self.process.alpha_sigma(t_max)[1], x_t)
        return self(z, torch.full_like(t, self.process.t_min), cond)
