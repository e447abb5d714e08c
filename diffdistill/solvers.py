"""PF-ODE solver steps, time grids and the many-step sampler. Steps take t and s of shape [B]."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.errors import UserError, refusing, require_positive
from diffdistill.process import VELOCITY, VP, X0, NoiseProcess, RectifiedFlow, expand, wide
from diffdistill.rng import Rng

MAX_STEPS = 10_000  # more is a slip of the keyboard
Solver = Callable[[Denoiser, Tensor, Tensor, Tensor, Cond], Tensor]
Grid = Callable[[NoiseProcess, int], tuple[float, ...]]  # (process, num_steps) -> num_steps + 1 decreasing times


def ddim(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """Move x_t from t to s < t along the PF-ODE, holding the x0 prediction fixed.

    x_t: [B, *shape]; t, s: [B] times of `denoiser.process`. Returns x_s. First order; exact for a point mass.
    Source: Song et al. 2021, arXiv:2010.02502, eq. 12.
    """
    return denoiser.process.jump(x_t, denoiser(x_t, t, cond), t, s)


def euler(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """Move x_t from t to s < t with the velocity at t. First order in t; equals ddim for EDM and rectified flow."""
    return x_t + expand(s - t, x_t) * denoiser.predict(x_t, t, cond, VELOCITY)


def heun(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """Move x_t from t to s < t with the mean of the velocities at both ends; second order, two calls.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    velocity = denoiser.predict(x_t, t, cond, VELOCITY)
    x_s = x_t + expand(s - t, x_t) * velocity
    return x_t + expand((s - t) / 2, x_t) * (velocity + denoiser.predict(x_s, s, cond, VELOCITY))


def heun_to_end(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """As `heun`, but DDIM in the samples whose s is t_min, as the last step of EDM's algorithm 1: there a second
    evaluation is wasted, and singular for kinds with a boundary. Two calls."""
    process = denoiser.process
    ends = s <= process.t_min
    ended = ends.view(-1, *[1] * (x_t.ndim - 1))
    velocity = denoiser.predict(x_t, t, cond, VELOCITY)
    landed = process.jump(x_t, process.convert(velocity, x_t, t, VELOCITY, X0), t, s)
    x_s = x_t + expand(s - t, x_t) * velocity
    # samples that end are evaluated where they began: a regular point, its result is not used
    again = denoiser.predict(torch.where(ended, x_t, x_s), torch.where(ends, t, s), cond, VELOCITY)
    return torch.where(ended, landed, x_t + expand((s - t) / 2, x_t) * (velocity + again))


@dataclass
class DPMpp2M:
    """DPM-Solver++(2M): DDIM with the x0 prediction extrapolated from the previous step; second order, one call.

    Holds the previous x0 and time of one trajectory: make one per trajectory (`start`). The step to sigma = 0 is
    DDIM's, as in the paper's code. Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """

    previous: tuple[Tensor, Tensor] | None = None

    def start(self) -> DPMpp2M:
        return DPMpp2M()

    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Move x_t from t to s < t, [B, *shape]; t, s: [B]."""
        process = denoiser.process
        x0 = denoiser(x_t, t, cond)
        target = x0
        if self.previous is not None:
            x0_before, before = self.previous
            # half log-SNR: lambda = log(alpha / sigma) = -log tan(angle)
            lambdas = [-torch.log(torch.tan(process.angle(time))) for time in (before, t, s)]
            ratio = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
            weight = torch.where(torch.isfinite(ratio) & (ratio > 0), 1 / (2 * ratio), torch.zeros_like(ratio))
            target = x0 + expand(weight, x0) * (x0 - x0_before)
        self.previous = (x0, t)
        return process.jump(x_t, target, t, s)


@refusing(lambda rho=7.0: require_positive(rho=rho))
def karras(process: NoiseProcess, num_steps: int, rho: float = 7.0) -> tuple[float, ...]:
    """Karras et al.'s grid on the noise-to-signal ratio: num_steps + 1 decreasing times, t_max to t_min.

    Needs alpha(t_max) > 0 and t_min > 0. Source: arXiv:2206.00364, eq. 5.
    """
    ends = process.angle(torch.tensor([process.t_max, process.t_min], dtype=torch.float64)).tan().numpy()
    if ends[0] > 1e8 or ends[1] <= 0:
        raise UserError(
            "grid",
            "karras needs finite noise-to-signal ratios > 0 at both ends of the process",
            tuple(ends.tolist()),
            "Mend them, or use uniform or logit_normal.",
        )
    high, low = ends ** (1 / rho)
    levels = torch.from_numpy(np.linspace(high, low, num_steps + 1) ** rho)
    return _ends_exact(process, process.time_at(torch.atan(levels)).tolist())


def _refuse_levels(last: int = 1, num_levels: int = 40, rho: float = 7.0) -> None:
    if not 3 <= num_levels <= MAX_STEPS:
        raise UserError("num_levels", f"must lie in 3..{MAX_STEPS}", num_levels, "40 is diffusers' own.")
    if not 1 <= last < num_levels - 1:
        raise UserError("last", f"must lie in 1..{num_levels - 2}", last, "24 is sigma .82 from 80.")
    require_positive(rho=rho)


@refusing(_refuse_levels)
def karras_few(
    process: NoiseProcess, num_steps: int, last: int, num_levels: int = 40, rho: float = 7.0
) -> tuple[float, ...]:
    """num_steps decreasing times for a few-step student, from t_max to level `last` of a Karras grid of num_levels.

    Level 0 is t_max; those between are equally spaced in level. On the 40 levels of diffusers'
    CMStochasticIterativeScheduler every choice can be exported.
    """
    if not 1 <= num_steps <= last + 1:
        raise UserError("steps", f"must lie in 1..{last + 1}", num_steps, "Few-step students take 1 to 8.")
    levels = karras(process, num_levels - 1, rho)
    return tuple(levels[round(index * last / max(1, num_steps - 1))] for index in range(num_steps))


def uniform(process: NoiseProcess, num_steps: int) -> tuple[float, ...]:
    """Equal steps in t: num_steps + 1 decreasing times, t_max to t_min."""
    return _ends_exact(process, np.linspace(process.t_max, process.t_min, num_steps + 1).tolist())


@refusing(lambda mean=0.0, std=1.0: require_positive(std=std))
def logit_normal(process: NoiseProcess, num_steps: int, mean: float = 0.0, std: float = 1.0) -> tuple[float, ...]:
    """Quantiles of a logit-normal law of t on [t_min, t_max]: num_steps + 1 decreasing times.

    Dense where training with that law is dense. Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    inner = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[1:-1]
    unit = torch.sigmoid(mean + std * torch.special.ndtri(inner))
    times = (process.t_min + (process.t_max - process.t_min) * unit).tolist()
    return _ends_exact(process, [process.t_max, *times, process.t_min])


@refusing(lambda shift=None: require_positive(shift=1.0 if shift is None else shift))
def flow_shift(process: NoiseProcess, num_steps: int, shift: float | None = None) -> tuple[float, ...]:
    """Rectified flow's grid in video models: u from 1 down in equal steps, moved to shift u / (1 + (shift - 1) u).

    num_steps + 1 decreasing times, t_max to t_min. A shift above 1 spends the steps where noise is high; None is the
    process's own. Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    if shift is None:
        shift = process.shift if isinstance(process, RectifiedFlow) else 1.0
    share = 1 - np.arange(num_steps) / num_steps
    moved = shift * share / (1 + (shift - 1) * share)
    times = process.t_min + (process.t_max - process.t_min) * moved
    return _ends_exact(process, [*times.tolist(), process.t_min])


def trailing(process: NoiseProcess, num_steps: int) -> tuple[float, ...]:
    """Equal steps counted back from t_max, t_min last: on DDPM's index the integers round(1000 i/n) - 1.

    Source: Lin et al. 2024, arXiv:2305.08891, table 2.
    """
    if not isinstance(process, VP):
        return uniform(process, num_steps)
    count = process.num_steps
    times = (np.round(np.arange(num_steps, 0, -1) * count / num_steps) - 1).clip(process.t_min, process.t_max)
    return (*times.tolist(), process.t_min)


def _ends_exact(process: NoiseProcess, times: list[float]) -> tuple[float, ...]:
    return (process.t_max, *times[1:-1], process.t_min)


class Sampler(Protocol):
    """Anything evaluation can draw from: a student's Generator or the teacher's OdeSampler."""

    @property
    def nfe(self) -> int: ...

    def sample(self, z: Tensor, cond: Cond, rng: Rng) -> Tensor: ...


@dataclass(frozen=True)
class OdeSampler:
    """The teacher's many-step sampler: one solver over one grid, ending with the denoiser's x0 at the last time.

    times: decreasing, at least two.  grid: the function that made them.  The last step of Heun is a DDIM step to t_min,
    as in EDM's algorithm 1.
    """

    denoiser: Denoiser
    solver: Solver
    times: tuple[float, ...]
    grid: Grid

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, guidance counted."""
        passes = 1 if self.denoiser.guidance is None else self.denoiser.guidance.passes
        steps = len(self.times) - 1
        return passes * (2 * steps - 1 if self.solver is heun else steps)

    def with_steps(self, num_steps: int) -> OdeSampler:
        """The same solver and grid with another number of steps."""
        return ode_sampler(self.denoiser, self.solver, self.grid, num_steps)

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """Samples [B, *shape] from unit noise z; the ODE is deterministic, rng is not used."""
        return sample(self.denoiser, self.solver, self.times, z, cond)


def ode_sampler(denoiser: Denoiser, solver: Solver, grid: Grid, num_steps: int) -> OdeSampler:
    """The sampler with num_steps steps of `solver` over `grid`, on the denoiser's own time range."""
    if not 1 <= num_steps <= MAX_STEPS:
        raise UserError("sampler.num_steps", f"must lie in 1..{MAX_STEPS}", num_steps, "18 is a good number for Heun.")
    return OdeSampler(denoiser, solver, grid(denoiser.process, num_steps), grid)


def sample(denoiser: Denoiser, solver: Solver, times: tuple[float, ...], z: Tensor, cond: Cond) -> Tensor:
    """Integrate the PF-ODE from sigma(times[0]) z over `times`; gradients flow if enabled.

    z: [B, *shape] unit noise. Returns the state at times[-1], where the last step is DDIM's (its end is x0 up to
    t_min, and a second evaluation there would be wasted).
    """
    for state in states(denoiser, solver, times, z, cond):
        x = state
    return x


def states(denoiser: Denoiser, solver: Solver, times: tuple[float, ...], z: Tensor, cond: Cond) -> Iterator[Tensor]:
    """The states [B, *shape] at each of `times` that `sample` passes through, from the noise to its result."""
    step = solver.start() if isinstance(solver, DPMpp2M) else solver
    grid = [torch.full((z.shape[0],), time, dtype=_time_dtype(z), device=z.device) for time in times]
    x = expand(denoiser.process.alpha_sigma(grid[0])[1], z) * z
    yield x
    for index, (t, s) in enumerate(itertools.pairwise(grid)):
        last = index == len(grid) - 2 and solver is heun
        x = (ddim if last else step)(denoiser, x, t, s, cond)
        yield x


def _time_dtype(z: Tensor) -> torch.dtype:
    return wide(z.dtype)
