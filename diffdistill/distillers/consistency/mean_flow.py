"""MeanFlow, distilled: the student learns the average velocity between any two times of the teacher's trajectory.

Paper: Geng et al. 2025, Mean Flows for One-step Generative Modeling, arXiv:2505.13447.
Headline: ImageNet-256 FID 3.43 in one step, 2.20 in two.

    L = E |u(x_t, t, s) - sg[v - (t - s) du/dt]|^2 / sg(|.|^2 + c)^p,   du/dt = JVP of u along (v, 1, 0)

in rectified flow, whatever process the teacher has.  u: the student's average velocity, x_s = x_t - (t - s) u, with s
an extra input.  v: the (guided) teacher's velocity at x_t, where the paper's training from scratch has eps - x0; the
diagonal u(x, t, t) = v is then the teacher's and needs no samples of its own.  p: .5 makes the gradient's length that
of a pseudo-Huber loss, 1 over-normalises.  t and s: two draws of one law, sorted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.autodiff import Tangent
from diffdistill.denoiser import Cond, FlowMap
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, student_times
from diffdistill.distillers.consistency.scm import held
from diffdistill.errors import UserError, require_positive
from diffdistill.generator import Generator, Renoise
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import VELOCITY, RectifiedFlow, expand, wide
from diffdistill.rng import Rng
from diffdistill.solvers import Grid
from diffdistill.times import TimeLaw


def average_target(
    student: FlowMap,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    velocity: Tensor,
    cond: Cond,
    tangent: Tangent,
    one_pass: bool = False,
) -> tuple[Tensor, Tensor]:
    """v - (t - s) du/dt, without gradient: what u(x_t, t, s) is where it is the average velocity; and that u, with one
    where they are enabled; [B, *shape] each. one_pass: see `Tangent`."""

    def average(x: Tensor, time: Tensor) -> Tensor:
        return student.average_velocity(x, time, s, cond)

    ours, along = tangent(average, (x_t, t), (velocity, torch.ones_like(t)), one_pass)
    return velocity - expand(t - s, x_t) * along, ours


class MeanFlow(Distiller):
    """times: the student's grid in the teacher's process, None is one step from t_max.  few_steps: grid for another
    number of steps.  law: of t and of s, in rectified flow.  to_end: share of samples whose s is t_min, as the sampler
    has it.  tangent: how du/dt is taken.  power, c: of the weight.
    """

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        few_steps: Grid,
        law: TimeLaw,
        to_end: float,
        tangent: Tangent,
        power: float,
        c: float,
    ) -> None:
        self.networks, self.times = networks, student_times(networks, times)
        self.renoise, self.few_steps, self.law, self.to_end = renoise, few_steps, law, to_end
        self.tangent, self.power, self.c = tangent, power, c
        networks["student"].process.check_times("distiller.times", self.times)

    @classmethod
    def needs(cls, to_end: float = 0.0, power: float = 0.0, c: float = 1.0, **hyperparameters: Any) -> frozenset[str]:
        require_positive(c=c)
        for key, value in (("to_end", to_end), ("power", power)):
            if not 0 <= value <= 1:
                raise UserError(key, "must lie in [0, 1]", value, "Mend it.")
        return frozenset({"x0", "jvp"})

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"target": Role(trainable=False), "student": Role(inputs=("s",))}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("student", ("student",), self.student_loss)]

    @property
    def generator(self) -> Generator:
        """Every step goes along the average velocity to t_min, and by t_min / t of its way beyond: its x0 prediction,
        which is what a stock pipeline gives."""
        student = self.networks["student"]
        to_end = student.given(s=student.process.t_min)
        return Generator(to_end, self.times, self.renoise, few_steps=self.few_steps)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        assert batch.x0 is not None
        rng, flow = rng.fork("MeanFlow"), RectifiedFlow()
        student = FlowMap(self.networks["student"].under(flow), "average")
        target, x0 = self.networks["target"].under(flow), batch.x0
        t, s = self._pair(rng, student, wide(x0.dtype))
        x_t = student.process.add_noise(x0, rng.normal(batch.shape, x0.dtype), t)
        with torch.no_grad():
            velocity = target.predict(x_t, t, batch.cond, VELOCITY)
        with rng.dropout():
            one_pass = self.networks.one_pass
            goal, ours = average_target(student, x_t, t, s, velocity, batch.cond, self.tangent, one_pass)
        error = (ours - goal).flatten(1).square().sum(1)
        weight = (error.detach() + self.c) ** -self.power
        return Loss({"mean_flow": (weight * error).mean()}, {"error": error.detach().mean()})

    def _pair(self, rng: Rng, student: FlowMap, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        process = student.process
        first, second = self.law(rng, process, dtype), self.law(rng, process, dtype)
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        ends = rng.uniform((len(rng),), dtype) < self.to_end
        t = held(t, process, self.tangent.reach)
        return t, torch.where(ends, torch.full_like(s, process.t_min), torch.minimum(s, t))
