"""DMD2: the student follows the score difference of teacher and fake score; a fast critic, an optional GAN.

Paper: Yin et al. 2024, Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv:2405.14867.
Headline: ImageNet-64 FID 1.28, SDXL 4 steps COCO-10k 19.32.

    L_student = E w <sg[D_fake(x_t, t) - D_target(x_t, t)], x0> + gan_weight softplus(-l(x_t'))
    L_critic  = E v(t) |D_fake(x_t, t) - sg[x0]|^2 + critic_gan_weight (softplus(-l_real) + softplus(l_fake))

x0: the student's sample.  x_t: that sample noised.  D_target: teacher (guided if asked).  D_fake: denoiser of the
student's own samples.  w: weight of one sample, 1 / mean|x0 - D_target| in the paper.  l: logit of heads on D_fake's
bottleneck (or the teacher's), each term at a time of its own.  The critic steps always, the student every
`student_every` steps, and then the critic reuses its samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond
from diffdistill.distillers.adversarial.heads import logit
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.diff_instruct import generator_loss
from diffdistill.distillers.distribution_matching.matching import DistributionMatching, check_gan_weights
from diffdistill.distillers.distribution_matching.weights import SampleWeight, inverse_omega, unit
from diffdistill.errors import require_at_least
from diffdistill.generator import Generator, Renoise, Until, checked_prior
from diffdistill.networks.roles import Networks, Role
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw

# config.yaml of older runs names the two weights here
__all__ = ["DMD2", "generator_loss", "inverse_omega", "unit"]

Features = Literal["fake_score", "target"]


class DMD2(DistributionMatching):
    """Beside DistributionMatching's: gan_law: law of t of the GAN's terms.  student_every: critic steps per student
    step.  gan_weight, critic_gan_weight: 0 and 0 is no GAN, no real data.  gan_features: whose bottleneck the heads
    read, the fake score's (which then learns from the GAN too) or the frozen teacher's.  prior_std: of the student's
    first input; None is the noise level of its first time.
    """

    critic_first = False

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        until: Until,
        student_law: TimeLaw,
        critic_law: TimeLaw,
        gan_law: TimeLaw,
        weight: SampleWeight,
        critic_weight: losses.DenoisingWeight,
        student_every: int,
        gan_weight: float,
        critic_gan_weight: float,
        gan_features: Features = "fake_score",
        prior_std: float | None = None,
    ) -> None:
        super().__init__(networks, times, renoise, until, student_law, critic_law, weight, critic_weight)
        self.prior_std = checked_prior(prior_std)
        self.gan_law, self.student_every, self.gan_features = gan_law, student_every, gan_features
        self.gan_weight, self.critic_gan_weight = gan_weight, critic_gan_weight

    @classmethod
    def needs(
        cls, student_every: int = 1, gan_weight: float = 0.0, critic_gan_weight: float = 0.0, **hyperparameters: Any
    ) -> frozenset[str]:
        require_at_least(1, student_every=student_every)
        check_gan_weights(gan_weight, critic_gan_weight, (3e-3, 1e-2))
        return frozenset({"x0"} if gan_weight else set())

    @classmethod
    def roles(
        cls, gan_weight: float = 0.0, gan_features: Features = "fake_score", **hyperparameters: Any
    ) -> Mapping[str, Role]:
        roles = {**super().roles()}
        if gan_weight:
            roles["discriminator"] = Role(init=None, build="heads", reads=gan_features)
        return roles

    @property
    def critics(self) -> tuple[str, ...]:
        return ("fake_score", "discriminator") if self.gan_weight else ("fake_score",)

    @property
    def generator(self) -> Generator:
        return Generator(self.networks["student"], self.times, self.renoise, self.prior_std)

    def student_is_due(self, step: int) -> bool:
        return step % self.student_every == 0

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        loss = generator_loss(self.target, self.fake_score, x0, eps, t, batch.cond, weight=self.weight)
        terms = {"dmd": loss.mean()}
        if self.gan_weight:
            terms["gan"] = self.gan_weight * losses.gan_generator(self._logit(x0, batch.cond, rng)).mean()
        return Loss(terms)

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.critic_samples(batch, rng)
        t, eps = self.noise(self.critic_law, x0, rng)
        loss = losses.denoising(self.fake_score, x0, eps, t, batch.cond, self.critic_weight)
        terms, stats = {"denoising": loss.mean()}, {}
        if self.gan_weight:
            assert batch.x0 is not None
            fake, real = self._logit(x0, batch.cond, rng), self._logit(batch.x0, batch.cond, rng)
            terms["gan"] = self.critic_gan_weight * losses.gan_discriminator(real, fake).mean()
            stats = {"logit_gap": (real - fake).mean().detach()}
        return Loss(terms, stats)

    def logit_at(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Discriminator logit [B] of noised samples."""
        return logit(self.networks["discriminator"], self.networks[self.gan_features], x_t, t, cond)

    def _logit(self, x0: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """Discriminator logit [B] of x0 at a fresh time and noise."""
        t, eps = self.noise(self.gan_law, x0, rng)
        return self.logit_at(self.add_noise(x0, eps, t), t, cond)
