"""Knowledge distillation: regression from prior noise to the teacher's own deterministic sample from it.

Paper: Luhman & Luhman 2021, Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed,
arXiv:2101.02388.
Headline: CIFAR-10 FID 9.36.

    L = E d(G(z), y),   y = the (guided) teacher's sample from z

G: the student, one step.  d: a distance.  The pairs (z, y) are made before the first step and need no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffdistill.denoiser import FlowMap
from diffdistill.distillers.base import Batch, Distiller, Loss, Pair, Phase, student_times
from diffdistill.errors import UserError
from diffdistill.generator import Generator, last_step
from diffdistill.losses import Distance
from diffdistill.networks.roles import Networks, Role
from diffdistill.rng import Rng


def regression(generator: Generator, pair: Pair, distance: Distance, rng: Rng) -> Tensor:
    """d(G(z), y) of stored pairs, [B]."""
    return distance(generator.rollout(pair.z, pair.cond, rng, last_step).x0, pair.x0)


class KD(Distiller):
    """times: the student's grid of one time, None is t_max.  distance: d."""

    def __init__(self, networks: Networks, times: Sequence[float] | None, distance: Distance) -> None:
        self.networks, self.times, self.distance = networks, student_times(networks, times), distance
        networks["student"].process.check_times("distiller.times", self.times)
        if len(self.times) > 1:
            raise UserError("distiller.times", "must hold one time: a pair has one step", times, "Leave one.")

    @classmethod
    def needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return frozenset({"pair"})

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"student": Role()}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("student", ("student",), self.student_loss)]

    @property
    def generator(self) -> Generator:
        return Generator(FlowMap(self.networks["student"], "consistency"), self.times)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        assert batch.pair is not None
        return Loss({"regression": regression(self.generator, batch.pair, self.distance, rng.fork("KD")).mean()})
