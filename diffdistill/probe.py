"""The probe: before a teacher is trusted, is it read as it was trained?

For x0 from the data, eps ~ N(0, I) and a noise level, every reading of the network (`readings`) estimates the same x0
from the same state, known up to factors. The posterior mean has the least squared error of all estimates, so the
reading that a network was trained under leaves the least residual at every noise level. Residuals are told relative to
that of the best straight line of the state: v lambda^2 / (v + lambda^2) for values of variance v at noise-to-signal
ratio lambda.

Where no data are known, each reading is asked about samples drawn under it. There a wrong one may leave little: shrunk
estimates draw shrunk samples. But the error of a posterior mean D is orthogonal to it, so the regression of x0 on D has
slope 1 at every noise level, and under wrong readings it has not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from diffdistill.data import Data
from diffdistill.denoiser import Cond, Denoiser, Network
from diffdistill.errors import UserError, require_at_least
from diffdistill.process import Kind, NoiseProcess
from diffdistill.readings import Inputs, ReadAs, Reading, declared, kinds, other_inputs, plausible
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng
from diffdistill.solvers import ddim, sample

LOWEST, HIGHEST = 0.1, 8.0  # noise levels, in standard deviations of the data
FIRST, LAST, STEPS = 80.0, 0.02, 24  # noise-to-signal ratios between which samples are drawn
FITS = 1.1  # times the straight line's residual, at every level
STRAIN = 0.15  # of the logarithm of slopes, on samples of its own
VARIES = 0.2  # residual that samples of another reading must leave at some level: constants leave none
TOLD = 0.1  # share of what it should be that an output must explain, on average; noise explains none
VALUES = 2**11  # that residuals are means over, in at least LEAST samples
AT_ONCE = 2**16  # values in a batch
LEAST, MOST = 4, 512


@dataclass(frozen=True)
class Finding:
    """What a reading leaves. residuals: [levels], relative to the best straight line's.  told: share of the output that
    is explained, mean over levels.  strain: largest |log| of a slope of x0 on the estimate."""

    reading: Reading
    residuals: tuple[float, ...]
    told: float
    strain: float

    @property
    def residual(self) -> float:
        """Geometric mean over the levels."""
        return math.exp(sum(math.log(max(r, 1e-12)) for r in self.residuals) / len(self.residuals))

    @property
    def fits(self) -> bool:
        """Whether it is a denoiser at all: no worse than a straight line anywhere, and more than silence."""
        return max(self.residuals) <= FITS and self.told >= TOLD

    @property
    def consistent(self) -> bool:
        """Whether samples drawn under it may be those of the law it denoises."""
        return self.fits and self.strain <= STRAIN


@dataclass(frozen=True)
class Verdict:
    """declared: the reading as configured.  better: one that leaves decisively less, if there is.

    own: whether they were measured on the teacher's own samples, for want of data.  levels: noise-to-signal ratios, in
    standard deviations of the data.  condition: the scale w at which D_null + w (D_c - D_null) leaves the least; None
    where there is no condition to leave out, or no data.  silent: why nothing was measured; "" if it was.  doubt: two
    standard errors of condition.
    """

    declared: Finding | None
    better: Finding | None
    own: bool
    levels: tuple[float, ...] = ()
    condition: float | None = None
    seconds: float = 0.0
    silent: str = ""
    doubt: float = 0.0

    def lines(self) -> list[str]:
        """For people, an accepted teacher's included."""
        if self.declared is None:
            return [f"probe: nothing was asked of the teacher: {self.silent}"]
        on = "its own samples" if self.own else "the data"
        found = (
            f"residual {self.declared.residual:.3g} of a straight line's at {len(self.levels)} noise levels of {on}, "
            f"{self.seconds:.1f} s"
        )
        if self.declared.consistent if self.own else self.declared.fits:
            lines = [f"probe: the teacher is read as it was trained: {found}"]
        else:
            lines = [
                f"probe: the teacher denoises under no reading that is known: {found}. Untrained weights look like "
                "this, and weights for other data."
            ]
        if self.condition is not None and math.isnan(self.condition):
            lines.append("probe: the teacher does not heed its condition: guidance does nothing")
        return lines

    def _told(self, found: Finding) -> str:
        """A reading's figures."""
        text = f"{found.residual:.3g} of a straight line's residual"
        return f"{text} and slopes off by {math.expm1(found.strain):.0%}" if self.own else text

    def refuse(self, networks: Mapping[str, Any]) -> None:
        """Raise UserError if another reading is decisively better, with both and their residuals."""
        if self.better is not None:
            assert self.declared is not None
            raise UserError(
                "networks",
                "must read the teacher as it was trained",
                f"a reading that leaves {self._told(self.declared)}, while this one leaves {self._told(self.better)}: "
                f"{self.better.reading.what}",
                f"{_where(networks)} probe=null trains as it is.",
            )
        if self.condition is not None and self.condition + self.doubt < 0.5:
            raise UserError(
                "networks",
                "must denoise the data best with their condition, at w = 1 of D_null + w (D_c - D_null)",
                f"one that does at w = {self.condition:.2f}",
                "The conditions may belong to other samples, be numbered or embedded otherwise, or count as the null "
                "condition. probe=null trains as it is.",
            )


def _where(networks: Mapping[str, Any]) -> str:
    if ".families." in str(networks.get("_target_")) and networks.get("path"):
        return f"Mend {networks['path']}/scheduler/scheduler_config.json, or the model's own config."
    return "Mend the keys of networks."


def ask(probe: Probe, recipe: Recipe, networks: Mapping[str, Any]) -> Verdict:
    """Ask the teacher of a recipe and print what is found. networks: the configuration it was built from.

    Raises UserError if the teacher is read otherwise than it was trained.
    """
    parts = recipe.networks
    verdict = probe.examine(parts.teacher, recipe.data, parts.device, parts.dtype)
    verdict.refuse(networks)
    for line in verdict.lines():
        Console().print(line, soft_wrap=True, highlight=False)
    return verdict


@dataclass(frozen=True)
class Probe:
    """num_samples: of data, or drawn; null: so many that residuals are means over 2,048 values, 4 to 512.

    batch_size: samples at once; null: so many that they hold 65,536 values.  levels: noise levels, spread geometrically
    over 0.1 to 8 standard deviations of the data.  margin: share by which another reading must lower the residual to be
    believed.  seed: of noise and data.
    """

    num_samples: int | None = None
    batch_size: int | None = None
    levels: int = 6
    margin: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=1 if self.batch_size is None else self.batch_size)
        require_at_least(2, levels=self.levels, num_samples=2 if self.num_samples is None else self.num_samples)
        require_at_least(0, seed=self.seed)
        if not 0 < self.margin < 1:
            raise UserError("margin", "must lie in (0, 1)", self.margin, "0.03 is a good margin.")

    @torch.no_grad()
    def examine(
        self, network: Any, data: Data, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Verdict:
        """Ask a network, on data where they have samples; dtype: of states."""
        started = time.perf_counter()
        values = math.prod(data.shape)
        num = self.num_samples or min(MOST, max(LEAST, VALUES // values))
        at_once = self.batch_size or max(1, AT_ONCE // values)
        rng = Rng(self.seed, 0, "probe", range(num), device)
        needs = frozenset({"x0"} & data.provides)
        batch = data.batch(rng.fork("data"), num, needs, dtype)
        cond = {key: value.to(device) for key, value in batch.cond.items()}
        if batch.x0 is None:
            verdict = self._own(network, cond, rng, batch.shape, dtype, at_once)
        elif float(batch.x0.std()) < 1e-6:
            return Verdict(None, None, False, silent="the data do not vary")
        else:
            verdict = self._given(network, batch.x0, cond, rng, at_once)
        return Verdict(**{**vars(verdict), "seconds": time.perf_counter() - started})

    def _given(self, network: Network, x0: Tensor, cond: Cond, rng: Rng, at_once: int) -> Verdict:
        """On data."""
        asked = _Asked(network, x0, cond, rng, self.levels, at_once)
        own, best = _compared(asked, declared(network), network, True, self.margin)
        weight, doubt = None, 0.0
        if best is None and (null := getattr(network, "null", None)) is not None and cond:
            empty = {**cond, **{k: v.to(x0.device).expand(len(x0), *v.shape[1:]) for k, v in null.items()}}
            without = _Asked(network, x0, empty, rng, self.levels, at_once).finding(own.reading)
            if own.fits or (without is not None and without.fits):  # else weights are at fault, not conditions
                weight, doubt = asked.weight(own.reading, null)
        return Verdict(own, best, False, asked.levels, weight, doubt=doubt)

    def _own(
        self, network: Network, cond: Cond, rng: Rng, shape: tuple[int, ...], dtype: torch.dtype, at_once: int
    ) -> Verdict:
        """On samples that each reading draws for itself: the right one finds its own sound."""

        def asked_of(reading: Reading) -> _Asked | None:
            x0 = _drawn(network, reading, cond, rng, shape, dtype, at_once)
            sound = bool(torch.isfinite(x0).all()) and 1e-4 < float(x0.std()) < 1e4
            return _Asked(network, x0, cond, rng, self.levels, at_once) if sound else None

        reading = declared(network)
        own, levels = Finding(reading, (math.inf,), 0.0, math.inf), tuple[float, ...]()
        if (asked := asked_of(reading)) is not None:
            levels = asked.levels
            own, best = _compared(asked, reading, network, False, self.margin)
            if own.consistent:
                return Verdict(own, best, True, levels)
        for group in plausible(network):  # the plainest first
            found = (asked.finding(other) for other in group if (asked := asked_of(other)) is not None)
            if sound := [f for f in found if f is not None and f.consistent and max(f.residuals) >= VARIES]:
                return Verdict(own, min(sound, key=lambda f: f.strain), True, levels)
        return Verdict(own, None, True, levels)


def _drawn(
    network: Network,
    reading: Reading,
    cond: Cond,
    rng: Rng,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    batch_size: int,
) -> Tensor:
    """Samples of a reading by DDIM over geometric noise levels."""
    process = reading.inputs.process
    ratios = torch.logspace(math.log10(FIRST), math.log10(LAST), STEPS, dtype=torch.float64)
    times = sorted(set(process.time_at(torch.atan(ratios)).tolist()), reverse=True)
    denoiser = Denoiser(ReadAs(network, reading))
    z = rng.fork("prior").normal(shape, dtype)
    parts = []
    for rows in _slices(len(z), batch_size):
        part = {key: value[rows] for key, value in cond.items()}
        parts.append(sample(denoiser, ddim, tuple(times), z[rows], part))
    return torch.cat(parts)


def _slices(num: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, num)) for first in range(0, num, size))


class _Asked:
    """A network before samples x0 under noise that all readings share."""

    def __init__(self, network: Network, x0: Tensor, cond: Cond, rng: Rng, levels: int, batch_size: int) -> None:
        self.network, self.x0, self.cond, self.batch_size = network, x0, cond, batch_size
        self._times: dict[Any, tuple[Tensor, float]] = {}
        self._factors: dict[Any, tuple[float, float]] = {}
        self.std = float(x0.std())
        self.mean = float(x0.mean())
        process = network.process
        ends = process.angle(torch.tensor([process.t_min, process.t_max], dtype=torch.float64)).tan() / self.std
        low, high = max(LOWEST, 1.01 * float(ends[0])), min(HIGHEST, 0.99 * float(ends[1]))
        self.levels = tuple(torch.logspace(math.log10(low), math.log10(high), levels).tolist())
        shape, dtype = tuple(x0.shape), x0.dtype
        self.noise = [rng.fork(f"level {level}").normal(shape, dtype) for level in range(levels)]
        # from the middle outwards: most wrong readings fail there
        self.order = sorted(range(levels), key=lambda i: abs(i - levels // 2))

    def residuals(self, readings: Iterable[Reading], level: int, num: int | None = None) -> dict[Reading, _Errors]:
        """Of readings that share their inputs, over the first `num` samples."""
        readings = tuple(readings)
        inputs, own = readings[0].inputs, readings[0].kind
        denoiser = Denoiser(ReadAs(self.network, readings[0]))
        t, line = self._time(inputs, level)
        mean = inputs.factor * self.mean + inputs.offset
        found: dict[Reading, list[Tensor]] = {reading: [] for reading in readings}
        for x0, eps, cond in self._samples(level, num):
            x0 = inputs.factor * x0 + inputs.offset
            times = t.repeat(len(x0))
            x_t = inputs.process.add_noise(x0, eps, times)
            raw = denoiser.predict(x_t, times, cond, own)
            for reading in readings:
                c_x, c_pred = self._x0_from(inputs.process, reading.kind, t)
                wanted, estimate = (x0 - c_x * x_t) / c_pred, c_x * x_t + c_pred * raw
                known, guessed = x0 - mean, estimate - mean
                parts = (
                    (estimate - x0).square(), (raw - wanted).square(), (wanted - wanted.mean()).square(),
                    known * guessed, guessed.square(),
                )  # fmt: skip
                found[reading].append(torch.stack([part.flatten(1).mean(1).double() for part in parts]))
        return {reading: _errors(torch.cat(parts, 1), line) for reading, parts in found.items()}

    def _time(self, inputs: Inputs, level: int) -> tuple[Tensor, float]:
        """The time of a level, [1], and what a straight line leaves there."""
        process, std = inputs.process, abs(inputs.factor) * self.std
        if (key := (process, level, std)) not in self._times:
            phi = torch.tensor([math.atan(self.levels[level] * std)], dtype=torch.float64, device=self.x0.device)
            t = process.time_at(phi)
            ratio = float(process.angle(t).tan())  # ends of its range hold it
            line = std**2 * ratio**2 / (std**2 + ratio**2)
            self._times[key] = t.to(torch.promote_types(self.x0.dtype, torch.float32)), line
        return self._times[key]

    def _x0_from(self, process: NoiseProcess, kind: Kind, t: Tensor) -> tuple[float, float]:
        """Factors on state and prediction that make x0, at a time [1]."""
        if (key := (process, kind, float(t))) not in self._factors:
            c_x, c_pred = kind.x0_from(process, t)
            self._factors[key] = float(c_x), float(c_pred)
        return self._factors[key]

    def _samples(self, level: int, num: int | None = None) -> Iterator[tuple[Tensor, Tensor, Cond]]:
        """x0, noise and condition of the first `num` samples, some at once."""
        for rows in _slices(num or len(self.x0), self.batch_size):
            yield self.x0[rows], self.noise[level][rows], {key: value[rows] for key, value in self.cond.items()}

    def finding(self, reading: Reading) -> Finding | None:
        """At all levels; None as soon as one shows that it does not fit."""
        found: dict[int, _Errors] = {}
        for level in self.order:
            found[level] = self.residuals([reading], level)[reading]
            if not found[level].residual <= FITS:
                return None
        return _summed(reading, found)

    def weight(self, reading: Reading, null: Cond) -> tuple[float, float]:
        """w in D_null + w (D_c - D_null) that leaves the least, over the upper half of the levels, and two standard
        errors of it: where the condition changes little, few samples say little.

        NaN where the condition changes nothing.
        """
        denoiser, process = Denoiser(ReadAs(self.network, reading)), reading.inputs.process
        above, below, size = list[Tensor](), list[Tensor](), list[Tensor]()
        for level in range(len(self.levels) // 2, len(self.levels)):
            t, _ = self._time(reading.inputs, level)
            for x0, eps, cond in self._samples(level):
                times = t.repeat(len(x0))
                x_t = process.add_noise(x0, eps, times)
                empty = {k: v.to(x0.device).expand(len(x0), *v.shape[1:]) for k, v in null.items()}
                without = denoiser(x_t, times, {**cond, **empty})
                gap = denoiser(x_t, times, cond) - without
                for found, part in ((above, (x0 - without) * gap), (below, gap.square()), (size, x0.square())):
                    found.append(part.flatten(1).mean(1).double())
        if float(torch.cat(below).mean()) < 1e-8 * float(torch.cat(size).mean()):
            return math.nan, 0.0
        gains, gaps = torch.cat(above), torch.cat(below)
        w = float(gains.sum() / gaps.sum())
        return w, 2 * float((gains - w * gaps).std()) * math.sqrt(len(gains)) / float(gaps.sum())


@dataclass(frozen=True)
class _Errors:
    """each: residuals of samples [N], relative to a straight line's.  told: share of the output explained.

    slope: of the regression of x0 on the estimate.
    """

    each: Tensor
    told: float
    slope: float

    @property
    def residual(self) -> float:
        found = float(self.each.mean())
        return found if math.isfinite(found) else math.inf


def _errors(parts: Tensor, line: float) -> _Errors:
    """parts: [5, N], means of the errors' squares, of the output's, of what it should be, and what the slope needs."""
    _, missed, all_, shared, square = (float(part) for part in parts.mean(1))
    return _Errors(parts[0] / line, 1 - missed / all_ if all_ > 0 else -math.inf, shared / square if square > 0 else 0)


def _summed(reading: Reading, found: Mapping[int, _Errors]) -> Finding:
    levels = sorted(found)
    told = sum(found[level].told for level in levels) / len(levels)
    slopes = [found[level].slope for level in levels]
    strain = max(abs(math.log(slope)) if 0 < slope < math.inf else math.inf for slope in slopes)
    return Finding(reading, tuple(found[level].residual for level in levels), told, strain)


def _compared(
    asked: _Asked, reading: Reading, network: Network, has_data: bool, margin: float
) -> tuple[Finding, Finding | None]:
    """What `reading` leaves, and the best of those that leave decisively less; None if there is none."""
    first = kinds(network, reading.inputs)
    own: dict[int, _Errors] = {}
    better: list[Finding] = []
    alive: list[Reading] = list(first[1:])
    found: dict[Reading, dict[int, _Errors]] = {other: {} for other in first}
    for level in asked.order:
        errors = asked.residuals(first, level)
        own[level] = errors[reading]
        for other in alive:
            found[other][level] = errors[other]
    alive = [other for other in alive if all(_survives(found[other][i], own[i]) for i in asked.order)]
    better += [_summed(other, found[other]) for other in alive]
    screen = max(2, len(asked.x0) // 16)
    for inputs in other_inputs(network, has_data):
        better += _survivors(asked, kinds(network, inputs), own, screen)
    mine = _summed(reading, own)
    decisive = [f for f in better if f.fits and f.residual <= (1 - margin) * mine.residual]
    least = min((f.residual for f in decisive), default=0.0)
    return mine, next((f for f in decisive if f.residual <= 1.005 * least), None)  # of equals the plainest comes first


def _survivors(asked: _Asked, readings: tuple[Reading, ...], own: Mapping[int, _Errors], screen: int) -> list[Finding]:
    """Of readings that share their inputs, those no worse than the declared one at any level, and denoisers."""
    found: dict[Reading, dict[int, _Errors]] = {reading: {} for reading in readings}
    for level in asked.order:
        if level == asked.order[0] and screen < len(asked.x0):  # a few samples tell most of them
            errors = asked.residuals(found, level, screen)
            mine = replace(own[level], each=own[level].each[:screen])
            found = {r: {} for r in found if _survives(errors[r], mine, slack=1.5)}
        if not found:
            return []
        errors = asked.residuals(found, level)
        found = {r: {**levels, level: errors[r]} for r, levels in found.items() if _survives(errors[r], own[level])}
    return [_summed(reading, levels) for reading, levels in found.items()]


def _survives(other: _Errors, own: _Errors, slack: float = 1.0) -> bool:
    """No worse than the declared reading within the noise of paired samples, and no worse than a straight line."""
    if not other.residual <= slack * FITS:
        return False
    gap = other.each - own.each
    noise = 2 * slack * float(gap.std()) / math.sqrt(len(gap))
    return float(gap.mean()) <= 0.02 * own.residual + (noise if math.isfinite(noise) else math.inf)
