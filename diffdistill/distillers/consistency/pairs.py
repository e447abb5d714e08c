"""Laws of the two times of a consistency pair, t > r, and the weights that go with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.process import NoiseProcess
from diffdistill.rng import Rng
from diffdistill.solvers import MAX_STEPS, Grid
from diffdistill.times import TimeLaw

# (rng, process) -> t, r with t > r >= t_min, [B] float64; rng.step is where a curriculum stands
PairLaw = Callable[[Rng, NoiseProcess], tuple[Tensor, Tensor]]
# (t, r, process) -> [B]
PairWeight = Callable[[Tensor, Tensor, NoiseProcess], Tensor]
# training step -> number of intervals of the grid
Curriculum = Callable[[int], int]

CLOSEST = 0.999  # of r to t: nearer, the two inputs of a float32 network round to one


@dataclass(frozen=True)
class ConstantSteps:
    """The same number of intervals at every step; the paper's CD has 39 (40 levels)."""

    num_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise UserError("num_steps", f"must lie in 1..{MAX_STEPS}", self.num_steps, "The paper uses 39.")

    def __call__(self, step: int) -> int:
        return self.num_steps


@dataclass(frozen=True)
class DoublingSteps:
    """min(first 2^floor(step / K'), last) intervals with K' = total_steps / (floor(log2(last / first)) + 1).

    Song & Dhariwal 2023, arXiv:2310.14189, section 3.4: coarse pairs carry the boundary quickly, fine ones are exact.
    """

    first: int
    last: int
    total_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= MAX_STEPS:
            constraint = f"must satisfy 1 <= first <= last <= {MAX_STEPS}"
            raise UserError("first, last", constraint, (self.first, self.last), "The paper uses 10 and 1280.")
        if self.total_steps < 1:
            raise UserError("total_steps", "must be >= 1", self.total_steps, "Give it trainer.steps.")

    def __call__(self, step: int) -> int:
        stages = int(math.log2(self.last / self.first)) + 1
        stage = step * stages // self.total_steps
        return min(self.first * 2**stage, self.last)


@dataclass(frozen=True)
class GridPairs:
    """Neighbours on a grid. Song et al. 2023, arXiv:2303.01469, algorithm 2.

    num_steps: intervals of the grid at a training step.  law: t drawn from it and moved up to the grid, which is iCT's
    discretised log-normal for a LogNormal; None draws every interval equally often, as CD does.
    """

    grid: Grid
    num_steps: Curriculum
    law: TimeLaw | None

    def __call__(self, rng: Rng, process: NoiseProcess) -> tuple[Tensor, Tensor]:
        count = self.num_steps(rng.step)
        times = torch.tensor(self.grid(process, count), dtype=torch.float64, device=rng.device)
        if self.law is None:
            index = rng.integers(count, (len(rng),))
        else:
            below = torch.searchsorted(times.flip(0), self.law(rng, process, torch.float64), right=True)
            index = (count - below).clamp(0, count - 1)
        return times[index], times[index + 1]


@dataclass(frozen=True)
class EasyPairs:
    """t from `law` and r / t = 1 - q^-(k+1) (1 + gain sigmoid(-slope t)) on noise levels, at stage k of num_stages.

    Stage k begins at step k total_steps / num_stages. Where the ratio is not positive r is t_min, so that q = 2 starts
    near denoising; it is held below .999. t is held at twice t_min and at level .001 or more: a pair needs two times.
    Geng et al. 2024 (ECT), arXiv:2406.14548, section 3 and appendix.
    """

    law: TimeLaw
    q: float
    num_stages: int
    total_steps: int
    gain: float
    slope: float

    def __post_init__(self) -> None:
        if not 1 < self.q < float("inf"):
            raise UserError("q", "must be > 1", self.q, "The paper uses 2, or 256 with one stage.")
        if self.num_stages < 1 or self.total_steps < 1:
            raise UserError(
                "num_stages, total_steps", "must be >= 1", (self.num_stages, self.total_steps), "Raise them."
            )
        if not (0 <= self.gain < float("inf") and 0 < self.slope < float("inf")):
            raise UserError("gain, slope", "must be >= 0 and > 0", (self.gain, self.slope), "The paper uses 8 and 1.")

    def __call__(self, rng: Rng, process: NoiseProcess) -> tuple[Tensor, Tensor]:
        stage = min(rng.step * self.num_stages // self.total_steps, self.num_stages - 1)
        ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device=rng.device)
        lowest = torch.tan(process.angle(ends))[0]
        level = torch.tan(process.angle(self.law(rng, process, torch.float64)))
        level = level.clamp(min=max(2 * float(lowest), 1e-3))
        gap = self.q ** -(stage + 1) * (1 + self.gain * torch.sigmoid(-self.slope * level))
        below = torch.maximum(level * (1 - gap).clamp(max=CLOSEST), lowest)
        return process.time_at(torch.atan(level)), process.time_at(torch.atan(below))


def unit(t: Tensor, r: Tensor, process: NoiseProcess) -> Tensor:
    """1, as CD has it."""
    return torch.ones_like(t)


def inverse_gap(t: Tensor, r: Tensor, process: NoiseProcess) -> Tensor:
    """1 / (t - r), as iCT and ECT have it: the sum over a trajectory does not depend on how finely it is cut."""
    return 1 / (t - r)
