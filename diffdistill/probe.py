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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from diffdistill.data import Data
from diffdistill.denoiser import Cond, Denoiser, Network, unconditioned
from diffdistill.errors import UserError, require_at_least
from diffdistill.probe_residuals import Asked, slices
from diffdistill.probe_search import compared
from diffdistill.probe_verdict import Finding, Verdict
from diffdistill.readings import ReadAs, Reading, declared, plausible
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng
from diffdistill.solvers import ddim, sample

FIRST, LAST, STEPS = 80.0, 0.02, 24  # noise-to-signal ratios between which samples are drawn
VARIES = 0.2  # residual that samples of another reading must leave at some level: constants leave none
VALUES = 2**11  # that residuals are means over, in at least LEAST samples
AT_ONCE = 2**16  # values in a batch
LEAST, MOST = 4, 512


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
        asked = Asked(network, x0, cond, rng, self.levels, at_once)
        own, best = compared(asked, declared(network), network, True, self.margin)
        weight, doubt = None, 0.0
        if best is None and (null := getattr(network, "null", None)) is not None and cond:
            without = Asked(network, x0, unconditioned(cond, null, x0), rng, self.levels, at_once).finding(own.reading)
            if own.fits or (without is not None and without.fits):  # else weights are at fault, not conditions
                weight, doubt = asked.weight(own.reading, null)
        return Verdict(own, best, False, asked.levels, weight, doubt=doubt)

    def _own(
        self, network: Network, cond: Cond, rng: Rng, shape: tuple[int, ...], dtype: torch.dtype, at_once: int
    ) -> Verdict:
        """On samples that each reading draws for itself: the right one finds its own sound."""

        def asked_of(reading: Reading) -> Asked | None:
            x0 = _drawn(network, reading, cond, rng, shape, dtype, at_once)
            sound = bool(torch.isfinite(x0).all()) and 1e-4 < float(x0.std()) < 1e4
            return Asked(network, x0, cond, rng, self.levels, at_once) if sound else None

        reading = declared(network)
        own, levels = Finding(reading, (math.inf,), 0.0, math.inf), tuple[float, ...]()
        if (asked := asked_of(reading)) is not None:
            levels = asked.levels
            own, best = compared(asked, reading, network, False, self.margin)
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
    for rows in slices(len(z), batch_size):
        part = {key: value[rows] for key, value in cond.items()}
        parts.append(sample(denoiser, ddim, tuple(times), z[rows], part))
    return torch.cat(parts)
