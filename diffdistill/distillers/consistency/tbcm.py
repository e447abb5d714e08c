"""TBCM: sCM on the states of the teacher's own sampler, from noise alone.

Paper: Tang et al. 2025, Image-Free Timestep Distillation via Continuous-Time Consistency with Trajectory-Sampled Pairs,
arXiv:2511.20410.
Headline: MJHQ-30k FID 6.52 in one step (SANA 0.6 B).

The loss is sCM's.  Its states: from noise at t_max, t_0 = t_max > t_1 > ..., each t_i uniform between its neighbours of
a reference grid, the first-order route x_{i+1} = cos(d) x_i - sin(d) v_i with d = t_i - t_{i+1} of the teacher, guided
by one scale if asked.
Every (x_i, t_i, v_i) but the first is a training point; v_i is exact at x_i, whatever the route's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.autodiff import Tangent
from diffdistill.denoiser import Cond
from diffdistill.distillers.base import Batch
from diffdistill.distillers.consistency.scm import ContinuousConsistency, held
from diffdistill.distillers.guidance.scales import UniformScale
from diffdistill.errors import UserError
from diffdistill.generator import Renoise
from diffdistill.networks.roles import Networks
from diffdistill.process import VELOCITY, X0, wide
from diffdistill.rng import Rng
from diffdistill.solvers import Grid


class TBCM(ContinuousConsistency):
    """Beside ContinuousConsistency's: points: of the route, the first of which is no training point: a batch of B
    prompts has B (points - 1) of them.  grid: the reference, in Trig."""

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        few_steps: Grid,
        points: int,
        grid: Grid,
        sigma_data: float,
        tangent: Tangent,
        normalise: float | None,
        warmup: int,
        adaptive: bool,
        scales: UniformScale | None,
        scale: float,
    ) -> None:
        super().__init__(
            networks, times, renoise, few_steps, sigma_data, tangent, normalise, warmup, adaptive, scales, scale
        )
        self.points, self.grid = points, grid

    @classmethod
    def needs(cls, *args: Any, points: int = 2, **hyperparameters: Any) -> frozenset[str]:
        if points < 2:
            raise UserError("points", "must be >= 2: the first is no training point", points, "The paper uses 16.")
        return super().needs(*args, **hyperparameters)

    def states(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Cond]:
        process = self.student.process
        noise = rng.normal(batch.shape, self.networks.dtype)
        times = self._times(rng, noise)
        x = process.add_noise(torch.zeros_like(noise), noise, times[0])
        teacher, cond = self.teacher(batch, rng)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.no_grad():
            for index, t in enumerate(times):
                velocity = teacher.predict(x, t, batch.cond, VELOCITY)
                found.append((x, t, velocity))
                if index + 1 < len(times):
                    x = process.jump(x, process.convert(velocity, x, t, VELOCITY, X0), t, times[index + 1])
        states, at, velocities = (torch.cat(part) for part in zip(*found[1:], strict=True))
        repeats = len(found) - 1
        repeated = {key: value.repeat(repeats, *[1] * (value.ndim - 1)) for key, value in cond.items()}
        return states, at, velocities, repeated

    def _times(self, rng: Rng, noise: Tensor) -> list[Tensor]:
        """t_max, then one time per interval of the reference grid, [B] each."""
        process, dtype = self.student.process, wide(noise.dtype)
        grid = torch.tensor(self.grid(process, self.points), dtype=dtype, device=noise.device)[:-1]
        share = rng.uniform((len(rng), self.points - 1), dtype)
        drawn = grid[1:] + share * (grid[:-1] - grid[1:])
        return [held(t, process, self.room) for t in (grid[0].expand(len(rng)), *drawn.T)]
