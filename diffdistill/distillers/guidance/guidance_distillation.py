"""Guidance distillation: one call of a student that takes the scale as an input, in place of the teacher's two.

Paper: Meng et al. 2022, On Distillation of Guided Diffusion Models, arXiv:2210.03142.
Headline: with its step halving, the teacher's FID in 4 steps on CIFAR-10 and ImageNet-64.

    L = E max(alpha^2/sigma^2, 1) |D(x_t, t, c, w) - D_target^w(x_t, t, c)|^2

x_t: noised data.  w: uniform in a range, the full scale.  D_target^w: D_null + w (D_c - D_null).  The embedding of w is
zero at first: the student begins as the conditional teacher.  With roles.student=lora this is its LoRA form
(arXiv:2312.06899).  Step halving (`progressive`) takes the student from here as its teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffdistill import losses
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase
from diffdistill.distillers.guidance.scales import UniformScale, guided_by, sampled
from diffdistill.errors import require_at_least
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import wide
from diffdistill.rng import Rng
from diffdistill.solvers import Grid, OdeSampler, Solver, ode_sampler
from diffdistill.times import TimeLaw


class GuidanceDistillation(Distiller):
    """scales: law of w, None learns the conditional teacher.  scale: w of the samples.  law: of t.  weight: on the
    squared x0 error.  solver, grid, num_steps: of the student's sampler.
    """

    def __init__(
        self,
        networks: Networks,
        scales: UniformScale | None,
        scale: float,
        law: TimeLaw,
        weight: losses.DenoisingWeight,
        solver: Solver,
        grid: Grid,
        num_steps: int,
    ) -> None:
        self.networks, self.scales, self.scale, self.law, self.weight = networks, scales, scale, law, weight
        self.solver, self.grid, self.num_steps = solver, grid, num_steps

    @classmethod
    def needs(
        cls, scales: UniformScale | None = None, scale: float = 1.0, num_steps: int = 1, **hyperparameters: Any
    ) -> frozenset[str]:
        require_at_least(1, num_steps=num_steps)
        if scales is None:
            return frozenset({"x0"})
        scales.check("scale", scale)
        return frozenset({"x0", "null"})

    @classmethod
    def roles(cls, scales: UniformScale | None = None, **hyperparameters: Any) -> Mapping[str, Role]:
        inputs = () if scales is None else ("w",)
        return {"target": Role(trainable=False), "student": Role(inputs=inputs)}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("student", ("student",), self.student_loss)]

    @property
    def generator(self) -> OdeSampler:
        student = sampled(self.networks["student"], self.scales, self.scale)
        return ode_sampler(student, self.solver, self.grid, self.num_steps)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        assert batch.x0 is not None
        rng, student, x0 = rng.fork("GuidanceDistillation"), self.networks["student"], batch.x0
        process, dtype = student.process, wide(x0.dtype)
        t = self.law(rng, process, dtype)
        x_t = process.add_noise(x0, rng.normal(batch.shape, x0.dtype), t)
        target, cond = self.networks["target"], batch.cond
        if self.scales is not None:
            w = self.scales(rng, dtype)
            target, cond = guided_by(self.networks, "target", w), {**cond, "w": w}
        with torch.no_grad():
            goal = target(x_t, t, batch.cond)
        error = losses.sample_mean((student(x_t, t, cond) - goal).square())
        return Loss({"guidance": (self.weight(t, process) * error).mean()})
