"""Diff-Instruct: the integral KL divergence of the noised marginals, by the plain difference of the two scores.

Paper: Luo et al. 2023, Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion
Models, arXiv:2305.18455.
Headline: CIFAR-10 FID 4.53, ImageNet-64 5.57.

    L_student = E w <sg[D_fake(x_t, t) - D_target(x_t, t)], x0>
    L_critic  = E v(t) |D_fake(x_t, t) - sg[x0]|^2

x0: the student's sample.  x_t: that sample noised.  D_target: teacher (guided if asked).  D_fake: denoiser of the
student's own samples.  w = 1: the gradient is sigma^2/alpha^2 times that of the KL at t.  The critic steps first, on
samples of its own.
"""

from __future__ import annotations

from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.matching import DistributionMatching
from diffdistill.distillers.distribution_matching.terms import Ratio, noised, pull, weighted
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.rng import Rng


def generator_loss(
    target: Denoiser,
    fake_score: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    weight: SampleWeight,
    ratio: Ratio | None = None,
) -> Tensor:
    """w <sg[D_fake - D_target], x0>, mean over coordinates, [B]; only its gradient with respect to x0 has meaning.

    x0, eps: [B, *shape]; t: [B]. Both denoisers see the same x_t and get no gradient. ratio: a factor of its own.
    """
    n = noised(target, fake_score, x0, eps, t, cond, through=False)
    return weighted(n, cond, weight, ratio) * pull(n)


class DiffInstruct(DistributionMatching):
    """Hyperparameters: see DistributionMatching."""

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        loss = generator_loss(self.target, self.fake_score, x0, eps, t, batch.cond, weight=self.weight)
        return Loss({"diff_instruct": loss.mean()})
