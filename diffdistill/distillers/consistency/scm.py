"""sCM: consistency without discretisation, by the tangent of the student along the teacher's trajectory.

Paper: Lu & Song 2024, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv:2410.11081.
Headline: CIFAR-10 FID 3.66 (two steps 2.52), ImageNet-64 2.44 (1.66).

    L = E e^-u(t) |F(x_t, t) - sg[F] - sg[g]|^2 / dim + u(t),   f = D = cos t x_t - sin t sd F
    g = n(cos t df/dt) = n(-cos^2 t (sd F - dx/dt) - r cos t sin t (x_t + sd dF/dt)),   n(g) = g / (|g| + c)

in TrigFlow, x_t = cos t x0 + sin t sd eps, whatever process the teacher has.  dx/dt: the (guided) teacher's velocity,
with a scale that the student may take as an input, or that of the data pair, which needs no teacher (sCT).  dF/dt:
along it, by forward mode or differences.  r: rises from 0 to 1.  u: a learned function of time.  The weight
1 / (sd tan t) of the paper's equation 6 is inside g.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.autodiff import Tangent
from diffdistill.denoiser import Cond, Denoiser, FlowMap
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, student_times
from diffdistill.distillers.guidance.scales import UniformScale, check_scale, guided_by, sampled
from diffdistill.errors import UserError, require_at_least, require_positive
from diffdistill.generator import Generator, Renoise
from diffdistill.losses import sample_mean
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import VELOCITY, NoiseProcess, Trig, expand, wide
from diffdistill.rng import Rng
from diffdistill.solvers import Grid
from diffdistill.times import TimeLaw


def consistency_tangent(
    student: Denoiser,
    x_t: Tensor,
    t: Tensor,
    velocity: Tensor,
    cond: Cond,
    ramp: float,
    tangent: Tangent,
    one_pass: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos t df/dt along `velocity`, without gradient, and the student's velocity sd F there, with one where they are
    enabled; [B, *shape] each.

    student: a view under Trig.  ramp: r.  At r = 0 it is -cos^2 t (sd F - dx/dt).  one_pass: see `Tangent`.
    """
    cos, sin = (expand(value, x_t) for value in (torch.cos(t), torch.sin(t)))
    scaled = cos * sin

    def predict(x: Tensor, time: Tensor) -> Tensor:
        return student.predict(x, time, cond, VELOCITY)

    ours, along = tangent(predict, (x_t, t), (scaled * velocity, torch.cos(t) * torch.sin(t)), one_pass)
    return -cos.square() * (ours.detach() - velocity) - ramp * (scaled * x_t + along), ours


def normalised(g: Tensor, c: float | None) -> Tensor:
    """g / (|g| + c) with the norm over all coordinates; g itself for None. Its fixed point is that of g, which is 0."""
    if c is None:
        return g
    norm = g.flatten(1).norm(dim=1)
    return g / expand(norm + c, g)


class ContinuousConsistency(Distiller):
    """sCM's loss on states that a subclass gives.

    times: the student's grid in the teacher's process, None is one step from t_max.  few_steps: grid for another
    number of steps.  sigma_data: sd.  tangent: how dF/dt is taken.  normalise: c, None leaves g as it is.  warmup:
    steps in which r rises.  adaptive: whether u is learned, else 0.  scales: law of w, which the student then takes as
    an input, None takes the teacher as it is.  scale: w of the samples.
    """

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        few_steps: Grid,
        sigma_data: float,
        tangent: Tangent,
        normalise: float | None,
        warmup: int,
        adaptive: bool,
        scales: UniformScale | None,
        scale: float,
    ) -> None:
        self.networks, self.times = networks, student_times(networks, times)
        self.renoise, self.few_steps, self.sigma_data = renoise, few_steps, sigma_data
        self.tangent, self.normalise, self.warmup, self.adaptive = tangent, normalise, warmup, adaptive
        self.scales, self.scale = scales, scale
        networks["student"].process.check_times("distiller.times", self.times)

    @classmethod
    def needs(
        cls,
        sigma_data: float = 0.5,
        normalise: float | None = None,
        warmup: int = 0,
        scales: UniformScale | None = None,
        scale: float = 1.0,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        require_positive(sigma_data=sigma_data)
        require_at_least(0, warmup=warmup)
        if normalise is not None:
            require_positive(normalise=normalise)
        check_scale(scales, scale)
        return frozenset({"jvp"}) if scales is None else frozenset({"jvp", "null"})

    @classmethod
    def roles(
        cls, adaptive: bool = False, scales: UniformScale | None = None, **hyperparameters: Any
    ) -> Mapping[str, Role]:
        roles = {"student": Role(inputs=() if scales is None else ("w",)), "target": Role(trainable=False)}
        if adaptive:
            roles["weight"] = Role(init=None, build="scalar")
        return roles

    def phases(self, step: int) -> Sequence[Phase]:
        trains = ("student", "weight") if self.adaptive else ("student",)
        return [Phase("student", trains, self.student_loss)]

    @property
    def generator(self) -> Generator:
        student = sampled(self.networks["student"], self.scales, self.scale)
        return Generator(FlowMap(student, "consistency"), self.times, self.renoise, few_steps=self.few_steps)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = rng.fork(type(self).__name__)
        x_t, t, velocity, cond = self.states(batch, rng)
        student, one_pass = self.student, self.networks.one_pass
        ramp = min(1.0, rng.step / self.warmup) if self.warmup else 1.0
        with rng.dropout():
            g, predicted = consistency_tangent(student, x_t, t, velocity, cond, ramp, self.tangent, one_pass)
        size = g.flatten(1).norm(dim=1).mean()
        gap = (predicted - predicted.detach()) / self.sigma_data - normalised(g, self.normalise)
        error = sample_mean(gap.square())
        if self.adaptive:
            log_variance = self.networks["weight"](student.network.time(t))
            error = torch.exp(-log_variance) * error + log_variance
        return Loss({"consistency": error.mean()}, {"tangent": size})

    @abstractmethod
    def states(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """x_t [N, *shape], t [N] in Trig, dx/dt there and the conditions."""

    @property
    def room(self) -> float:
        """How far the tangent moves a time: by cos t sin t <= 1/2 times its reach."""
        return self.tangent.reach / 2

    @property
    def student(self) -> Denoiser:
        """The student under TrigFlow."""
        return self.networks["student"].under(Trig(sigma_data=self.sigma_data))

    def teacher(self, batch: Batch, rng: Rng) -> tuple[Denoiser, Cond]:
        """The teacher under TrigFlow, guided if asked, and what the student is to be called with."""
        trig = Trig(sigma_data=self.sigma_data)
        if self.scales is None:
            return self.networks["target"].under(trig), batch.cond
        w = self.scales(rng.fork("scale"), wide(self.networks.dtype))
        return guided_by(self.networks, "target", w).under(trig), {**batch.cond, "w": w}


class SCM(ContinuousConsistency):
    """On noised data. Beside ContinuousConsistency's: law: of t, in Trig.  velocity: teacher or data."""

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        few_steps: Grid,
        law: TimeLaw,
        sigma_data: float,
        velocity: Literal["teacher", "data"],
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
        self.law, self.velocity = law, velocity

    @classmethod
    def needs(cls, *args: Any, velocity: str = "teacher", **hyperparameters: Any) -> frozenset[str]:
        if velocity not in ("teacher", "data"):
            raise UserError("velocity", "must be teacher or data", velocity, "data is consistency training, sCT.")
        if velocity == "data" and (scales := hyperparameters.get("scales")) is not None:
            raise UserError("scales", "must be null with velocity=data", scales, "Data pairs have no scale.")
        return super().needs(*args, **hyperparameters) | {"x0"}

    @classmethod
    def roles(cls, *args: Any, velocity: str = "teacher", **hyperparameters: Any) -> Mapping[str, Role]:
        roles = super().roles(*args, **hyperparameters)
        return {name: role for name, role in roles.items() if name != "target" or velocity == "teacher"}

    def states(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Cond]:
        assert batch.x0 is not None
        process, x0 = self.student.process, batch.x0
        t = held(self.law(rng, process, wide(x0.dtype)), process, self.room)
        eps = rng.normal(batch.shape, x0.dtype)
        x_t = process.add_noise(x0, eps, t)
        if self.velocity == "teacher":
            teacher, cond = self.teacher(batch, rng)
            with torch.no_grad():
                return x_t, t, teacher.predict(x_t, t, batch.cond, VELOCITY), cond
        alpha_rate, sigma_rate = (expand(rate, x0) for rate in process.rates(t))
        return x_t, t, alpha_rate * x0 + sigma_rate * eps, batch.cond


def held(t: Tensor, process: NoiseProcess, room: float) -> Tensor:
    """t kept off the ends of the process by `room`, and off t_min, where a map that is the identity has no velocity:
    at twice t_min and .001 or more."""
    return t.clamp(max(2 * process.t_min, 1e-3) + room, process.t_max - room)
