"""DMD: the normalised score difference, held together by a regression on pairs of the teacher's own sampler.

Paper: Yin et al. 2023, One-step Diffusion with Distribution Matching Distillation, arXiv:2311.18828.
Headline: CIFAR-10 FID 2.66, ImageNet-64 2.62.

    L_student = E w <sg[D_fake(x_t, t) - D_target(x_t, t)], x0> + regression_weight d(G(z_ref), y_ref)
    L_critic  = E v(t) |D_fake(x_t, t) - sg[x0]|^2

w: 1 / mean|x0 - D_target|.  (z_ref, y_ref): noise and the (guided) teacher's deterministic sample from it, made before
the first step.  G: the student, one step.  d: a distance, LPIPS in the paper.  The student steps first, the critic on
the same samples. Without regression and with several critic steps per student step this is DMD2 without its GAN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffdistill import losses
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.diff_instruct import generator_loss
from diffdistill.distillers.distribution_matching.matching import DistributionMatching
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.distillers.trajectory.kd import regression
from diffdistill.errors import UserError, require_at_least
from diffdistill.generator import Renoise, Until
from diffdistill.networks.roles import Networks
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw

__all__ = ["DMD", "generator_loss"]


class DMD(DistributionMatching):
    """Beside DistributionMatching's: student_every: critic steps per student step.  regression_weight: 0 needs no
    pairs.  distance: d."""

    critic_first = False

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        until: Until,
        student_law: TimeLaw,
        critic_law: TimeLaw,
        weight: SampleWeight,
        critic_weight: losses.DenoisingWeight,
        student_every: int,
        regression_weight: float,
        distance: losses.Distance,
    ) -> None:
        super().__init__(networks, times, renoise, until, student_law, critic_law, weight, critic_weight)
        self.student_every, self.regression_weight, self.distance = student_every, regression_weight, distance
        if regression_weight and len(self.times) > 1:
            fix = "Set it to 0, or take one step."
            raise UserError("regression_weight", "must be 0 with several steps: a pair has one", regression_weight, fix)

    @classmethod
    def needs(cls, regression_weight: float = 0.0, student_every: int = 1, **hyperparameters: Any) -> frozenset[str]:
        require_at_least(0, regression_weight=regression_weight)
        require_at_least(1, student_every=student_every)
        return frozenset({"pair"} if regression_weight else set())

    def student_is_due(self, step: int) -> bool:
        return step % self.student_every == 0

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        loss = generator_loss(self.target, self.fake_score, x0, eps, t, batch.cond, weight=self.weight)
        terms = {"dmd": loss.mean()}
        if self.regression_weight:
            assert batch.pair is not None
            distance = regression(self.generator, batch.pair, self.distance, rng.fork("pair"))
            terms["regression"] = self.regression_weight * distance.mean()
        return Loss(terms)
