"""Fresh pairs: one-step regression on the teacher's own samples, made anew at every step instead of stored.

    L = E d(G(z), Phi_K(z)),   z ~ N(0, I)

G: the student, one step from t_max.  Phi_K: K solver steps of the (guided) teacher from the same noise z.  d: a
distance.  Against `kd` no pair is seen twice, at the price of K steps of the teacher in each training step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffdistill.denoiser import FlowMap
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, student_times
from diffdistill.generator import Generator, last_step
from diffdistill.losses import Distance
from diffdistill.networks.roles import Networks, Role
from diffdistill.rng import Rng
from diffdistill.solvers import Grid, Solver, ode_sampler


class FreshPairs(Distiller):
    """solver, grid, num_steps: of the teacher.  distance: d."""

    def __init__(self, networks: Networks, solver: Solver, grid: Grid, num_steps: int, distance: Distance) -> None:
        self.networks, self.solver, self.grid, self.num_steps = networks, solver, grid, num_steps
        self.distance = distance
        self.times = student_times(networks, None)
        ode_sampler(networks["teacher"], solver, grid, num_steps)  # refuses what cannot be, before any work

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"student": Role()}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("student", ("student",), self.student_loss)]

    @property
    def generator(self) -> Generator:
        return Generator(FlowMap(self.networks["student"], "consistency"), self.times)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        """z: [B, *shape] unit noise; both maps start from sigma(t_max) z."""
        rng = rng.fork("FreshPairs")
        z = rng.normal(batch.shape, self.networks.dtype)
        teacher = ode_sampler(self.networks["teacher"], self.solver, self.grid, self.num_steps)
        target = teacher.sample(z, batch.cond, rng)
        x0 = self.generator.rollout(z, batch.cond, rng, last_step).x0
        return Loss({"regression": self.distance(x0, target).mean()})
