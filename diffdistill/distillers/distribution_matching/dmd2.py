"""DMD2: the student follows the score difference of teacher and fake score; a fast critic, an optional GAN.

Paper: Yin et al. 2024, Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv:2405.14867.

    L_student = E w <sg[D_fake(x_t, t) - D_target(x_t, t)], x0> + gan_weight softplus(-l(x_t'))
    L_critic  = E v(t) |D_fake(x_t, t) - sg[x0]|^2 + critic_gan_weight (softplus(-l_real) + softplus(l_fake))

x0: the student's sample.  x_t: that sample noised.  D_target: teacher (guided if asked).  D_fake: denoiser of the
student's own samples.  w: weight of one sample, 1 / mean|x0 - D_target| in the paper.  l: logit of heads on D_fake's
bottleneck, each term at a time of its own.  The critic steps always, the student every `student_every` steps, and
then the critic reuses its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, student_times
from diffdistill.errors import UserError
from diffdistill.generator import Generator, Renoise, Rollout, Until
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import NoiseProcess
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw

# (x0, D_target, t, process) -> [B], detached
SampleWeight = Callable[[Tensor, Tensor, Tensor, NoiseProcess], Tensor]
# (x_t, t, cond) -> [B], detached: a function of the density ratio teacher / student
Ratio = Callable[[Tensor, Tensor, Cond], Tensor]


def unit(x0: Tensor, d_target: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """1: the gradient is sigma^2/alpha^2 times that of the KL divergence of the marginals at t."""
    return torch.ones_like(t)


def inverse_omega(x0: Tensor, d_target: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """1 / mean|x0 - D_target| per sample, floored at 1e-5 (DMD, arXiv:2311.18828, eq. 8)."""
    omega = losses.sample_mean((x0 - d_target).abs().to(torch.promote_types(x0.dtype, torch.float32)))
    return 1 / omega.clamp(min=1e-5)


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

    x0, eps: [B, *shape]; t: [B]. Both denoisers see the same x_t and get no gradient.
    """
    with torch.no_grad():
        x_t = target.process.add_noise(x0, eps, t)
        d_target = target(x_t, t, cond)
        direction = fake_score(x_t, t, cond) - d_target
        w = weight(x0, d_target, t, target.process)
        if ratio is not None:
            w = w * ratio(x_t, t, cond)
    return w * losses.sample_mean(direction * x0)


class DMD2(Distiller):
    """times: the student's grid, None is one step from t_max.  renoise, until: of its rollout.

    student_law, critic_law, gan_law: laws of t.  weight: of one sample in the student's loss.  critic_weight: on the
    critic's x0 error.  student_every: critic steps per student step.  gan_weight, critic_gan_weight: 0 and 0 is no
    GAN, no real data.
    """

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
    ) -> None:
        if student_every < 1:
            raise UserError("student_every", "must be >= 1", student_every, "The paper uses 5 or 10.")
        self.networks, self.times, self.renoise, self.until = networks, student_times(networks, times), renoise, until
        self.student_law, self.critic_law, self.gan_law = student_law, critic_law, gan_law
        self.weight, self.critic_weight, self.student_every = weight, critic_weight, student_every
        self.gan_weight, self.critic_gan_weight = gan_weight, critic_gan_weight
        networks["student"].process.check_times("distiller.times", self.times)

    @classmethod
    def needs(cls, gan_weight: float = 0.0, critic_gan_weight: float = 0.0, **hyperparameters: Any) -> frozenset[str]:
        if min(gan_weight, critic_gan_weight) < 0 or (gan_weight > 0) != (critic_gan_weight > 0):
            raise UserError(
                "distiller.gan_weight, distiller.critic_gan_weight",
                "must both be > 0 (GAN) or both 0 (no GAN)",
                (gan_weight, critic_gan_weight),
                "The paper uses 3e-3 and 1e-2.",
            )
        return frozenset({"x0"} if gan_weight else set())

    @classmethod
    def roles(cls, gan_weight: float = 0.0, **hyperparameters: Any) -> Mapping[str, Role]:
        roles = {"target": Role(trainable=False), "student": Role(), "fake_score": Role()}
        if gan_weight:
            roles["discriminator"] = Role(init=None, build="heads", reads="fake_score")
        return roles

    def phases(self, step: int) -> Sequence[Phase]:
        critics = ("fake_score", "discriminator") if self.gan_weight else ("fake_score",)
        critic = Phase("critic", critics, self.critic_loss)
        if step % self.student_every:
            return [critic]
        return [Phase("student", ("student",), self.student_loss), critic]

    @property
    def generator(self) -> Generator:
        return Generator(self.networks["student"], self.times, self.renoise)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = rng.fork("DMD2")
        rollout = batch.memo["rollout"] = self._rollout(batch, rng)
        x0, (t, eps) = rollout.x0, self._noise(self.student_law, rollout.x0, rng)
        target, fake_score = self.networks["target"], self.networks["fake_score"]
        loss = generator_loss(target, fake_score, x0, eps, t, batch.cond, weight=self.weight)
        terms = {"dmd": loss.mean()}
        if self.gan_weight:
            terms["gan"] = self.gan_weight * losses.gan_generator(self._logit(x0, batch.cond, rng)).mean()
        return Loss(terms)

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = rng.fork("DMD2")
        if "rollout" not in batch.memo:
            with torch.no_grad():
                batch.memo["rollout"] = self._rollout(batch, rng)
        x0 = batch.memo["rollout"].x0.detach()
        t, eps = self._noise(self.critic_law, x0, rng)
        loss = losses.denoising(self.networks["fake_score"], x0, eps, t, batch.cond, self.critic_weight)
        terms, stats = {"denoising": loss.mean()}, {}
        if self.gan_weight:
            assert batch.x0 is not None
            fake, real = self._logit(x0, batch.cond, rng), self._logit(batch.x0, batch.cond, rng)
            terms["gan"] = self.critic_gan_weight * losses.gan_discriminator(real, fake).mean()
            stats = {"logit_gap": (real - fake).mean().detach()}
        return Loss(terms, stats)

    def _rollout(self, batch: Batch, rng: Rng) -> Rollout:
        z = rng.normal(batch.shape, self.networks.dtype)
        return self.generator.rollout(z, batch.cond, rng, self.until)

    def _noise(self, law: TimeLaw, x0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        t = law(rng, self.networks["target"].process, torch.promote_types(x0.dtype, torch.float32))
        return t, rng.normal(tuple(x0.shape), x0.dtype)

    def _logit(self, x0: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """Discriminator logit [B] of x0 at a fresh time and noise."""
        heads, fake_score = self.networks["discriminator"], self.networks["fake_score"]
        t, eps = self._noise(self.gan_law, x0, rng)
        x_t = fake_score.process.add_noise(x0, eps, t)
        features = fake_score.features(x_t, t, cond, heads.layers)
        return heads(dict(zip(heads.layers, features, strict=True)))
