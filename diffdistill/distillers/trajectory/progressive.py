"""Progressive distillation: the student lands in one DDIM step where the teacher lands in two, becomes the teacher, and
the number of steps halves.

Paper: Salimans & Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512.
Headline: CIFAR-10 FID 9.12 in one step, 4.51 in two.

    L = E max(alpha^2/sigma^2, 1) |D(x_t, t) - D~|^2,   D~ = (x_s - rho x_t) / (alpha_s - rho alpha_t),
    x_s = two DDIM steps of the target from x_t,   rho = sigma_s / sigma_t

t > m > s: three neighbours on a grid of twice the student's steps.  D~: the x0 prediction whose one DDIM step from t to
s lands at x_s.  The target is the (guided) teacher first, the student of the stage before it after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.base import Batch, Cond, Distiller, Loss, Phase, Transition
from diffdistill.errors import UserError, require_at_least
from diffdistill.generator import Generator, ddim
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import NoiseProcess, expand, wide
from diffdistill.rng import Rng
from diffdistill.solvers import Grid
from diffdistill.solvers import ddim as ddim_step


def implied_x0(process: NoiseProcess, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 prediction at (x_t, t) whose DDIM step to s lands at x_s, [B, ...]: the inverse of `NoiseProcess.jump`.

    In float64: the denominator falls with the number of steps. s < t.
    """
    alpha_t, sigma_t = process.alpha_sigma(t.double())
    alpha_s, sigma_s = process.alpha_sigma(s.double())
    rho = sigma_s / sigma_t
    gap = x_s.double() - expand(rho, x_s.double()) * x_t.double()
    return (gap / expand(alpha_s - rho * alpha_t, gap)).to(x_t.dtype)


class Progressive(Distiller):
    """num_steps: the student's steps, stage by stage, each half of the one before it.  shares: of the training steps
    that each stage takes, relative to each other.  total_steps: of the run.  grid: (process, 2 N) -> times.  weight: on
    the squared x0 error.
    """

    def __init__(
        self,
        networks: Networks,
        num_steps: Sequence[int],
        shares: Sequence[float],
        total_steps: int,
        grid: Grid,
        weight: losses.DenoisingWeight,
    ) -> None:
        self.networks, self.num_steps, self.grid, self.weight = networks, tuple(num_steps), grid, weight
        self.ends = tuple(round(total_steps * part / sum(shares)) for part in accumulate(shares))
        if any(a >= b for a, b in pairwise((0, *self.ends))):
            constraint = f"must give every stage a step of the {total_steps}"
            raise UserError("distiller.shares", constraint, list(shares), "Train longer, or take fewer stages.")
        self.stage = len(self.num_steps) - 1  # a reader of a finished run

    @classmethod
    def needs(
        cls,
        num_steps: Sequence[int] = (1,),
        shares: Sequence[float] = (1,),
        total_steps: int = 1,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        require_at_least(1, total_steps=total_steps)
        if not num_steps or num_steps[-1] < 1 or any(a != 2 * b for a, b in pairwise(num_steps)):
            raise UserError("num_steps", "must halve from stage to stage", list(num_steps), "Write [8,4,2,1].")
        if len(shares) != len(num_steps) or not all(share > 0 for share in shares):
            constraint = f"must hold {len(num_steps)} numbers > 0, one per stage"
            raise UserError("shares", constraint, list(shares), "[1,1,1,2] gives the last stage twice the others.")
        return frozenset({"x0"})

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"target": Role(trainable=False, writable=True), "student": Role()}

    def phases(self, step: int) -> Sequence[Phase]:
        self.stage = self._stage(step)
        return [Phase("student", ("student",), self.student_loss)]

    def after_step(self, step: int) -> Transition | None:
        if step + 1 not in self.ends[:-1]:
            return None
        return Transition(copy=(("student", "target"),), restart=("student",))

    @property
    def generator(self) -> Generator:
        """The steps of the stage in progress; of the last one before and after training."""
        return Generator(self.networks["student"], self._times(self.num_steps[self.stage])[:-1], ddim)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        assert batch.x0 is not None
        rng, student = rng.fork("Progressive"), self.networks["student"]
        process, x0 = student.process, batch.x0
        count = self.num_steps[self._stage(rng.step)]
        fine = torch.tensor(self._times(2 * count), device=x0.device, dtype=wide(x0.dtype))
        index = 2 * rng.integers(count, (len(rng),))
        t, m, s = fine[index], fine[index + 1], fine[index + 2]
        x_t = process.add_noise(x0, rng.normal(batch.shape, x0.dtype), t)
        goal = two_steps(self.networks["target"], x_t, t, m, s, batch.cond)
        error = losses.sample_mean((student(x_t, t, batch.cond) - goal).square())
        return Loss({"progressive": (self.weight(t, process) * error).mean()}, {"stage": torch.tensor(float(count))})

    def _times(self, num_steps: int) -> tuple[float, ...]:
        return self.grid(self.networks["student"].process, num_steps)

    def _stage(self, step: int) -> int:
        return min(sum(step >= end for end in self.ends), len(self.ends) - 1)


@torch.no_grad()
def two_steps(target: Denoiser, x_t: Tensor, t: Tensor, m: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """The x0 prediction that lands in one DDIM step from t to s where two of the target, by way of m, land."""
    x_m = ddim_step(target, x_t, t, m, cond)
    x_s = ddim_step(target, x_m, m, s, cond)
    return implied_x0(target.process, x_t, x_s, t, s)
