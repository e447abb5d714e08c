"""Denoising score matching: trains or fine-tunes a teacher on real data (no distillation).

Paper: Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.

    L = E_{x0, eps, t} w(t) |D(x_t, t, c) - x0|^2,   c replaced by the null condition with probability `null_share`

D: the student's denoiser.  t: the time law.  w: a weight on the x0 error; the minimiser is E[x0 | x_t, c] for any w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffdistill import losses
from diffdistill.condition import dropped
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase
from diffdistill.errors import UserError
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import wide
from diffdistill.rng import Rng
from diffdistill.solvers import OdeSampler
from diffdistill.times import TimeLaw


class Denoising(Distiller):
    """time_law: law of t.  weight: on the x0 error.  null_share: label dropout, in [0, 1).  sampler: evaluates it."""

    def __init__(
        self,
        networks: Networks,
        time_law: TimeLaw,
        weight: losses.DenoisingWeight,
        null_share: float,
        sampler: Callable[[Denoiser], OdeSampler],
    ) -> None:
        self.networks, self.time_law, self.weight = networks, time_law, weight
        self.null_share, self.sampler = null_share, sampler

    @classmethod
    def needs(cls, null_share: float = 0.0, **hyperparameters: Any) -> frozenset[str]:
        if not 0 <= null_share < 1:
            raise UserError("distiller.null_share", "must lie in [0, 1)", null_share, "Typical: 0.1.")
        return frozenset({"x0", "null"} if null_share else {"x0"})

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"student": Role()}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("student", ("student",), self.student_loss)]

    @property
    def generator(self) -> OdeSampler:
        return self.sampler(self.networks["student"])

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        assert batch.x0 is not None
        rng = rng.fork("Denoising")
        student = self.networks["student"]
        t = self.time_law(rng, student.process, wide(batch.x0.dtype))
        eps = rng.normal(batch.shape, batch.x0.dtype)
        cond = dropped(batch.cond, self.networks.teacher.null, self.null_share, rng)
        loss = losses.denoising(student, batch.x0, eps, t, cond, self.weight)
        return Loss({"denoising": loss.mean()})
