"""What readings of a network leave of given samples under noise that they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser, Network, unconditioned
from diffdistill.probe_verdict import FITS, Finding
from diffdistill.process import Kind, NoiseProcess, wide
from diffdistill.readings import Inputs, ReadAs, Reading
from diffdistill.rng import Rng

LOWEST, HIGHEST = 0.1, 8.0  # noise levels, in standard deviations of the data


def slices(num: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, num)) for first in range(0, num, size))


class Asked:
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

    def residuals(self, readings: Iterable[Reading], level: int, num: int | None = None) -> dict[Reading, Errors]:
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
        return {reading: errors(torch.cat(parts, 1), line) for reading, parts in found.items()}

    def _time(self, inputs: Inputs, level: int) -> tuple[Tensor, float]:
        """The time of a level, [1], and what a straight line leaves there."""
        process, std = inputs.process, abs(inputs.factor) * self.std
        if (key := (process, level, std)) not in self._times:
            phi = torch.tensor([math.atan(self.levels[level] * std)], dtype=torch.float64, device=self.x0.device)
            t = process.time_at(phi)
            ratio = float(process.angle(t).tan())  # ends of its range hold it
            line = std**2 * ratio**2 / (std**2 + ratio**2)
            self._times[key] = t.to(wide(self.x0.dtype)), line
        return self._times[key]

    def _x0_from(self, process: NoiseProcess, kind: Kind, t: Tensor) -> tuple[float, float]:
        """Factors on state and prediction that make x0, at a time [1]."""
        if (key := (process, kind, float(t))) not in self._factors:
            c_x, c_pred = kind.x0_from(process, t)
            self._factors[key] = float(c_x), float(c_pred)
        return self._factors[key]

    def _samples(self, level: int, num: int | None = None) -> Iterator[tuple[Tensor, Tensor, Cond]]:
        """x0, noise and condition of the first `num` samples, some at once."""
        for rows in slices(num or len(self.x0), self.batch_size):
            yield self.x0[rows], self.noise[level][rows], {key: value[rows] for key, value in self.cond.items()}

    def finding(self, reading: Reading) -> Finding | None:
        """At all levels; None as soon as one shows that it does not fit."""
        found: dict[int, Errors] = {}
        for level in self.order:
            found[level] = self.residuals([reading], level)[reading]
            if not found[level].residual <= FITS:
                return None
        return summed(reading, found)

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
                without = denoiser(x_t, times, unconditioned(cond, null, x_t))
                gap = denoiser(x_t, times, cond) - without
                for found, part in ((above, (x0 - without) * gap), (below, gap.square()), (size, x0.square())):
                    found.append(part.flatten(1).mean(1).double())
        if float(torch.cat(below).mean()) < 1e-8 * float(torch.cat(size).mean()):
            return math.nan, 0.0
        gains, gaps = torch.cat(above), torch.cat(below)
        w = float(gains.sum() / gaps.sum())
        return w, 2 * float((gains - w * gaps).std()) * math.sqrt(len(gains)) / float(gaps.sum())


@dataclass(frozen=True)
class Errors:
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


def errors(parts: Tensor, line: float) -> Errors:
    """parts: [5, N], means of the errors' squares, of the output's, of what it should be, and what the slope needs."""
    _, missed, all_, shared, square = (float(part) for part in parts.mean(1))
    return Errors(parts[0] / line, 1 - missed / all_ if all_ > 0 else -math.inf, shared / square if square > 0 else 0)


def summed(reading: Reading, found: Mapping[int, Errors]) -> Finding:
    levels = sorted(found)
    told = sum(found[level].told for level in levels) / len(levels)
    slopes = [found[level].slope for level in levels]
    strain = max(abs(math.log(slope)) if 0 < slope < math.inf else math.inf for slope in slopes)
    return Finding(reading, tuple(found[level].residual for level in levels), told, strain)
