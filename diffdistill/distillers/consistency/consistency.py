"""Consistency distillation and training: the student's end point is the same at neighbouring points of a trajectory.

Paper: Song et al. 2023, Consistency Models, arXiv:2303.01469.

    L = E w(t, r) d(f(x_t, t), sg f~(x_r, r)),   x_r = Phi(x_t, t -> r; D_target)

f: the student's map to t_min, f(x, t_min) = x.  f~: its moving average, or the student itself.  Phi: one solver step
along the (guided) teacher's PF-ODE; without a solver x_r = alpha_r x0 + sigma_r eps with the noise of x_t, which needs
no teacher (consistency training).  d: a distance.  w: a weight.  (t, r): a law of pairs, with its curriculum; the
discretised one of the paper, iCT (arXiv:2310.14189) or ECT (arXiv:2406.14548).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffdistill.denoiser import Cond, Denoiser, FlowMap
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, student_times
from diffdistill.distillers.consistency.pairs import PairLaw, PairWeight
from diffdistill.errors import UserError
from diffdistill.generator import Generator, Renoise, checked_prior
from diffdistill.losses import Distance
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import wide
from diffdistill.rng import Rng
from diffdistill.solvers import Grid, Solver


class Consistency(Distiller):
    """times: the student's grid, None is one step from t_max.  renoise: between steps.  few_steps: grid for another
    number of steps; the student is trained at all times.  pairs: law of (t, r).  solver: of the teacher's step, None is
    consistency training.  distance: d.  weight: w.  target_decay: of the average f~, None is the student itself.
    prior_std: of the sampler's first input, None is the noise level of its first time.
    """

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        few_steps: Grid,
        pairs: PairLaw,
        solver: Solver | None,
        distance: Distance,
        weight: PairWeight,
        target_decay: float | None,
        prior_std: float | None = None,
    ) -> None:
        self.networks, self.times, self.renoise, self.few_steps = (
            networks,
            student_times(networks, times),
            renoise,
            few_steps,
        )
        self.pairs, self.solver, self.distance, self.weight = pairs, solver, distance, weight
        self.closer = "student" if target_decay is None else "student_ema"
        self.prior_std = checked_prior(prior_std)
        networks["student"].process.check_times("distiller.times", self.times)

    @classmethod
    def needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return frozenset({"x0"})

    @classmethod
    def roles(
        cls, solver: Solver | None = None, target_decay: float | None = None, **hyperparameters: Any
    ) -> Mapping[str, Role]:
        if target_decay is not None and not 0 <= target_decay < 1:
            raise UserError("distiller.target_decay", "must lie in [0, 1) or be null", target_decay, "Paper: 0.95.")
        roles = {"student": Role()}
        if solver is not None:
            roles["target"] = Role(trainable=False)
        if target_decay is not None:
            roles["student_ema"] = Role(init="student", trainable=False, ema_of="student", ema=target_decay)
        return roles

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("student", ("student",), self.student_loss)]

    @property
    def generator(self) -> Generator:
        student = FlowMap(self.sampled(self.networks["student"]), "consistency")
        return Generator(student, self.times, self.renoise, self.prior_std, self.few_steps)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        assert batch.x0 is not None
        rng = rng.fork(type(self).__name__)
        process, x0 = self.networks["student"].process, batch.x0
        t64, r64 = self.pairs(rng, process)
        t, r = (time.to(wide(x0.dtype)) for time in (t64, r64))
        eps = rng.normal(batch.shape, x0.dtype)
        x_t = process.add_noise(x0, eps, t)
        with torch.no_grad():
            cond = batch.cond
            if self.solver is None:
                x_r = process.add_noise(x0, eps, r)
            else:
                target, cond = self.teacher(batch, rng)
                x_r = self.solver(target, x_t, t, r, batch.cond)
            with rng.dropout():
                goal = self._map(self.closer).x0(x_r, r, cond)
        with rng.dropout():  # the same mask, else its noise is part of the distance
            ours = self._map("student").x0(x_t, t, cond)
        distance = self.distance(ours, goal)
        weight = self.weight(t64, r64, process).to(distance.dtype)  # a gap of float32 times has few digits
        return Loss({"consistency": (weight * distance).mean()}, {"distance": distance.detach().mean()})

    def teacher(self, batch: Batch, rng: Rng) -> tuple[Denoiser, Cond]:
        """Whose step closes a pair, and the student's conditions."""
        return self.networks["target"], batch.cond

    def sampled(self, student: Denoiser) -> Denoiser:
        """The student as its sampler calls it."""
        return student

    def _map(self, role: str) -> FlowMap:
        return FlowMap(self.networks[role], "consistency")
