"""Readings of a network: what is taken for granted when it is called, and what else could be.

A reading says which state the network is shown, which time it is told, and what its output means. All readings estimate
the same x0 from the same noise, so a network trained on one of them leaves the least error there, at every noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond, Network
from diffdistill.process import (
    EDM,
    EPS,
    SCORE,
    VELOCITY,
    VP,
    X0,
    BoundaryF,
    F,
    Kind,
    Negated,
    NoiseProcess,
    RectifiedFlow,
    Trig,
    V,
)

OfTime = Callable[[Tensor], Tensor]
KINDS: tuple[tuple[str, Kind], ...] = (
    ("the noise (epsilon)", EPS),
    ("the clean sample (sample)", X0),
    ("v (v_prediction)", V),
    ("the velocity of the flow (flow_prediction)", VELOCITY),
    ("the velocity with its sign turned", Negated(VELOCITY)),
    ("v with its sign turned", Negated(V)),
    ("the score", SCORE),
    ("EDM's F at sigma_data 0.5", F(0.5)),
    ("EDM's F at sigma_data 1", F(1.0)),
)
PROCESSES: tuple[tuple[str, NoiseProcess], ...] = (
    ("DDPM's linear betas from 0.0001 to 0.02", VP()),
    ("scaled_linear betas from 0.00085 to 0.012", VP(beta_start=0.00085, beta_end=0.012, schedule="scaled_linear")),
    (
        "scaled_linear betas from 0.00085 to 0.012 with rescale_betas_zero_snr",
        VP(beta_start=0.00085, beta_end=0.012, schedule="scaled_linear", zero_terminal_snr=True),
    ),
    ("a rectified flow", RectifiedFlow()),
    ("EDM's noise levels", EDM()),
    ("TrigFlow at sigma_data 1", Trig(sigma_data=1.0)),
)
SHIFTS = (1 / 6, 1 / 3, 1 / 2, 2.0, 3.0, 6.0)
FACTORS = (1 / 8, 0.18215, 0.25, 0.36, 0.5, 0.7, 1.4, 2.0, 2.8, 4.0, 1 / 0.18215, 8.0)


@dataclass(frozen=True)
class Inputs:
    """What a network is shown: states of `process` of the data factor * x0 + offset, times scale and time.

    what: how this differs from what is declared, in words; "" is the declared one.  w: what a scale input is fed.
    """

    what: str
    process: NoiseProcess
    scale: OfTime
    time: OfTime
    factor: float = 1.0
    offset: float = 0.0
    w: float | None = None


@dataclass(frozen=True)
class Reading:
    """Inputs and what the output is, each with its words."""

    inputs: Inputs
    kind: Kind
    predicts: str = ""

    @property
    def what(self) -> str:
        """In words; "" is what is declared."""
        predicts = f"it predicts {self.predicts}" if self.predicts else ""
        return "; ".join(part for part in (self.inputs.what, predicts) if part)


class ReadAs:
    """A network under another reading, with everything else its own: the protocol of `denoiser.Network`."""

    def __init__(self, network: Network, reading: Reading) -> None:
        inputs = reading.inputs
        self.network, self.process, self.kind, self.w = network, inputs.process, reading.kind, inputs.w
        self.scale, self.time = inputs.scale, inputs.time

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.network.blocks

    def __call__(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        told = cond if self.w is None else {**cond, "w": torch.full_like(t_net, self.w)}
        return self.network(x, t_net, told)


def declared(network: Network) -> Reading:
    """How the network says it is read; a scale input is fed 1, the plain conditional model."""
    w = 1.0 if hasattr(network, "fed_scale") else None
    return Reading(Inputs("", network.process, network.scale, network.time, w=w), network.kind)


def kinds(network: Network, inputs: Inputs) -> tuple[Reading, ...]:
    """Every output that these inputs may have led to; the declared one first."""
    own = Reading(inputs, network.kind)
    more: tuple[tuple[str, Kind], ...] = KINDS
    if isinstance(network.kind, F | BoundaryF):
        more = (*more, ("the declared kind with its sign turned", Negated(network.kind)))
    return own, *(Reading(inputs, kind, name) for name, kind in more if kind != network.kind)


def other_inputs(network: Network, has_data: bool) -> Iterator[Inputs]:
    """What else the network may have been shown in training. has_data: the data are known, not its own samples."""
    own = declared(network).inputs
    process = own.process
    yield replace(
        own, what="its time runs the other way", time=lambda t: network.time(process.t_min + process.t_max - t)
    )
    yield from _units(network, own)
    yield from (_shifted(network, own, shift) for shift in SHIFTS)
    yield from _scales(network, own)
    yield from _processes(network, own)
    if own.w is not None:
        told = "its scale input counts from 0, not from 1 (guidance convention: added)"
        yield replace(own, what=told, w=0.0)
        yield replace(own, what="its scale input is 1000 times the scale", w=1000.0)
        yield replace(own, what="its scale input is the scale, not 1000 times it", w=0.001)
    if has_data:
        yield replace(own, what="its data lie in [0, 1], these in [-1, 1]", factor=0.5, offset=0.5)
        yield replace(own, what="its data lie in [-1, 1], these in [0, 1]", factor=2.0, offset=-1.0)
        for factor in FACTORS:
            yield replace(own, what=f"its data are {factor:.3g} times these", factor=factor)


def _units(network: Network, own: Inputs) -> Iterator[Inputs]:
    """Other units of the time it is told."""
    for factor in (1000.0, 0.001):
        told = f"it is told {factor:g} times that time"
        yield replace(own, what=told, time=partial(_scaled_time, network.time, factor))


def _scaled_time(time: OfTime, factor: float, t: Tensor) -> Tensor:
    return factor * time(t)


def _shifted(network: Network, own: Inputs, shift: float) -> Inputs:
    """Told the time of `shift` times the noise-to-signal ratio, as a flow's grid is shifted."""
    process = own.process

    def time(t: Tensor) -> Tensor:
        alpha, sigma = process.alpha_sigma(t)
        return network.time(process.time_at(torch.atan2(shift * sigma, alpha)))

    return replace(own, what=f"it is told the time that a shift of {shift:.3g} leads to", time=time)


def _scales(network: Network, own: Inputs) -> Iterator[Inputs]:
    """Other factors on the state."""
    process = own.process
    yield replace(own, what="its state is not scaled", scale=torch.ones_like)
    for sigma_data in (0.5, 1.0):

        def scale(t: Tensor, sigma_data: float = sigma_data) -> Tensor:
            alpha, sigma = process.alpha_sigma(t)
            return torch.rsqrt((alpha * sigma_data).square() + sigma.square())

        yield replace(own, what=f"its state is divided by its standard deviation, at sigma_data {sigma_data:g}",
                      scale=scale)  # fmt: skip


def _processes(network: Network, own: Inputs) -> Iterator[Inputs]:
    """Other processes with the times that their networks are told."""
    for what, process in PROCESSES:
        if process == own.process or (isinstance(process, RectifiedFlow) and isinstance(own.process, RectifiedFlow)):
            continue
        for units, time, scale in _conventions(process):
            yield replace(own, what=f"it was trained on {what}{units}", process=process, time=time, scale=scale)
    if isinstance(own.process, VP):  # the same betas with the other end, and CogVideoX's shifts
        turned = replace(own.process, zero_terminal_snr=not own.process.zero_terminal_snr)
        name = "with" if turned.zero_terminal_snr else "without"
        yield replace(own, what=f"it was trained {name} rescale_betas_zero_snr", process=turned)
        for shift in sorted({1.0, 3.0} - {own.process.snr_shift}):
            moved = replace(own.process, snr_shift=shift)
            yield replace(own, what=f"it was trained with snr_shift_scale {shift:g}", process=moved)


def _conventions(process: NoiseProcess) -> Iterator[tuple[str, OfTime, OfTime]]:
    """Units of time in words, what the network is told, and the factor on its state."""
    if isinstance(process, EDM):
        for sigma_data in (0.5, 1.0):
            yield f", at sigma_data {sigma_data:g}", partial(_log_time, 0.25), partial(_unit, sigma_data)
        yield ", told 250 ln sigma", partial(_log_time, 250.0), partial(_unit, 0.5)  # CMStochasticIterativeScheduler
    elif isinstance(process, RectifiedFlow):
        for end in (1.0, 1000.0):
            told = f", told times 0 to {end:g}"
            yield told, partial(_scaled_time, _same, end), torch.ones_like
            yield f"{told} from noise to data", partial(_scaled_time, _from_noise, end), torch.ones_like
    else:
        yield "", _same, torch.ones_like


def _same(t: Tensor) -> Tensor:
    return t


def _from_noise(t: Tensor) -> Tensor:
    return 1 - t


def _log_time(factor: float, t: Tensor) -> Tensor:
    return factor * torch.log(t)


def _unit(sigma_data: float, t: Tensor) -> Tensor:
    """EDM's factor to unit variance."""
    return torch.rsqrt(t.square() + sigma_data**2)


def plausible(network: Network) -> tuple[Iterator[Reading], Iterator[Reading]]:
    """Readings worth drawing samples under, where that is all that can be done: every output of the declared inputs;
    then, of other inputs, the declared output and those that go with their process."""

    def others() -> Iterator[Reading]:
        for inputs in other_inputs(network, False):
            usual = _USUAL[type(inputs.process)]
            yield from (r for r in kinds(network, inputs) if r.kind in usual or r.kind == network.kind)

    return iter(kinds(network, declared(network).inputs)[1:]), others()


_USUAL: dict[type[NoiseProcess], tuple[Kind, ...]] = {
    VP: (EPS, V, X0),
    RectifiedFlow: (VELOCITY, Negated(VELOCITY), X0),
    EDM: (F(0.5), F(1.0), EPS, X0),
    Trig: (V, F(1.0)),
}
