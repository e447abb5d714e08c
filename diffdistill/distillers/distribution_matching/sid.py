"""SiD: the Fisher divergence of the noised marginals, by identities that need no gradient of the student's score.

Paper: Zhou et al. 2024, Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models
for One-Step Generation, arXiv:2404.04057.
Headline: CIFAR-10 FID 1.92 (conditional 1.71), ImageNet-64 1.52.

    L_student = E w [ <gap, D_fake - x0> + (1 - alpha) |gap|^2 ],   gap = D_target(x_t, t) - D_fake(x_t, t)
    L_critic  = E v(t) |D_fake(x_t, t) - sg[x0]|^2

Gradient flows through x0 and through the inputs of both networks, whose weights are frozen.  With D_fake at its optimum
alpha = 1/2 is half the gradient of E w |gap|^2, alpha = 1 half of it with the law of x_t held fixed; the paper's 1.2
goes further.  w = 1 / mean|x0 - D_target|.  The critic steps first, on samples of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.matching import DistributionMatching
from diffdistill.distillers.distribution_matching.terms import Ratio, identity, noised, weighted
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.generator import Renoise, Until
from diffdistill.networks.roles import Networks
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw


def generator_loss(
    target: Denoiser,
    fake_score: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    weight: SampleWeight,
    alpha: float,
    ratio: Ratio | None = None,
) -> Tensor:
    """w [<gap, D_fake - x0> + (1 - alpha) |gap|^2], means over coordinates, [B]; its expectation is (1 - alpha) F.

    x0, eps: [B, *shape]; t: [B]. ratio: a further factor, detached.
    """
    n = noised(target, fake_score, x0, eps, t, cond, through=True)
    return weighted(n, cond, weight, ratio) * identity(n, alpha)


class SiD(DistributionMatching):
    """Beside DistributionMatching's: alpha: of the loss; .5 to 1.2 in the paper."""

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
        alpha: float,
    ) -> None:
        super().__init__(networks, times, renoise, until, student_law, critic_law, weight, critic_weight)
        self.alpha = alpha

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        loss = generator_loss(
            self.target, self.fake_score, x0, eps, t, batch.cond, weight=self.weight, alpha=self.alpha
        )
        return Loss({"sid": loss.mean()})
