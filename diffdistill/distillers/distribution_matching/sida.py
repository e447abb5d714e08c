"""SiDA: SiD with a discriminator that has no parameters of its own, to pass the teacher with real data.

Paper: Zhou et al. 2024, Adversarial Score identity Distillation: Rapidly Surpassing the Teacher in One Step,
arXiv:2410.14919.
Headline: CIFAR-10 FID 1.50 (conditional 1.40), ImageNet-64 1.11.

    L_student = E w [ <gap, D_fake - x0> + (1 - alpha) |gap|^2 + gan_weight B ],   B = mean_batch softplus(-l(x_t))
    L_critic  = E v(t) { |D_fake - sg[x0]|^2 + critic_gan_weight (softplus(-l(y_t)) + softplus(l(x_t))) / 2 }

gap = D_target(x_t, t) - D_fake(x_t, t).  l: channel means of D_fake's bottleneck, at the very (x_t, t) of D_fake, from
the same pass.  y: real data, noised with the t and the noise of x.  Every sample shares the one adversarial mean B
under its own weight w = 1 / mean|x0 - D_target|.  The critic steps first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching import encoder_gan
from diffdistill.distillers.distribution_matching.matching import check_gan_weights
from diffdistill.distillers.distribution_matching.sid import SiD
from diffdistill.distillers.distribution_matching.terms import Ratio, identity, noised, weighted
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.errors import require_at_least
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
    adversarial: Callable[[], Tensor] | None = None,
    ratio: Ratio | None = None,
) -> Tensor:
    """w [<gap, D_fake - x0> + (1 - alpha) |gap|^2 + adversarial()], means over coordinates, [B].

    x0, eps: [B, *shape]; t: [B]. adversarial: a scalar, called after both networks. ratio: a further factor, detached.
    """
    n = noised(target, fake_score, x0, eps, t, cond, through=True)
    loss = identity(n, alpha)
    return weighted(n, cond, weight, ratio) * (loss if adversarial is None else loss + adversarial())


class SiDA(SiD):
    """Beside SiD's: gan_weight, critic_gan_weight: 0 and 0 is no GAN, no real data.  student_from, gan_from: steps
    before which the student waits, and before which its loss has no GAN term (a critic that starts anew leads it
    astray)."""

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
        gan_weight: float,
        critic_gan_weight: float,
        student_from: int,
        gan_from: int,
    ) -> None:
        super().__init__(networks, times, renoise, until, student_law, critic_law, weight, critic_weight, alpha)
        self.gan_weight, self.critic_gan_weight = gan_weight, critic_gan_weight
        self.student_from, self.gan_from = student_from, gan_from

    @classmethod
    def needs(
        cls,
        gan_weight: float = 0.0,
        critic_gan_weight: float = 0.0,
        student_from: int = 0,
        gan_from: int = 0,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        check_gan_weights(gan_weight, critic_gan_weight, (1e-4, "1 / (number of coordinates)"))
        require_at_least(0, student_from=student_from, gan_from=gan_from)
        return frozenset({"x0"} if gan_weight else set())

    def student_is_due(self, step: int) -> bool:
        return step >= self.student_from

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        step, rng = rng.step, self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        fake_score = self.fake_score
        with fake_score.record(encoder_gan.bottleneck(fake_score)) as found:

            def adversarial() -> Tensor:
                return self.gan_weight * losses.gan_generator(encoder_gan.recorded(found)).mean()

            loss = self.matched(x0, eps, t, batch.cond, adversarial if self._gan_is_on(step) else None, found)
        return Loss({"matching": loss.mean()})

    def matched(
        self,
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Cond,
        adversarial: Callable[[], Tensor] | None,
        found: dict[int, list[Tensor]],
    ) -> Tensor:
        """The generator loss [B]. found: the bottleneck of D_fake's call, once it was made."""
        return generator_loss(
            self.target, self.fake_score, x0, eps, t, cond,
            weight=self.weight, alpha=self.alpha, adversarial=adversarial,
        )  # fmt: skip

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.critic_samples(batch, rng)
        t, eps = self.noise(self.critic_law, x0, rng)
        loss = losses.denoising(self.fake_score, x0, eps, t, batch.cond, self.critic_weight)
        terms, stats = {"denoising": loss.mean()}, {}
        if self.gan_weight:
            assert batch.x0 is not None
            both, gap = encoder_gan.discriminator(self.fake_score, batch.x0, x0, t, eps, batch.cond)
            weight = self.critic_gan_weight * self.critic_weight(t, self.fake_score.process)
            terms["gan"] = (weight * both).mean()
            stats = {"logit_gap": gap.mean()}
        return Loss(terms, stats)

    def _gan_is_on(self, step: int) -> bool:
        return self.gan_weight > 0 and step >= self.gan_from
