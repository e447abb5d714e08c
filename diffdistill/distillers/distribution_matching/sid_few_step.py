"""Few-step SiD: one generator for K steps, the uniform mixture of all its steps' outputs matched with one fake score.

Paper: Zhou et al. 2025, Few-Step Diffusion via Score identity Distillation, arXiv:2505.12674.
Headline: SDXL, 4 steps, COCO-10k FID 13.25.

    k ~ uniform{1..K},   x0 = G(x_{t_k}, t_k) after k - 1 steps of the student's own sampler without gradient
    L_student = E w <D_target^k4 - D_fake^k2, D_fake^k3 - x0> + gan_weight mean softplus(-l(x_t))
    L_critic  = E v(t) |D_fake^k1(x_t, t) - sg[x0]|^2 + critic_gan_weight (softplus(-l(y_t)) + softplus(l(x_t))) / 2

t_k = t_init (1 - (k - 1) / K) unless `times` says otherwise; k is equal on all ranks and for both phases of a step.
k1 to k4: see SiD-LSG; at k1 = k2 = k3 = 0 and k4 = 1 the fake has no condition (Zero-CFG), below 0 it leads away from
it (Anti-CFG).  l: channel means of D_fake's bottleneck (SiDA), at a (t, noise) shared by x and real data y.
Formulas as in the successor's code (SiD-DiT, arXiv:2509.25127).  The critic steps first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffdistill import losses
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching import encoder_gan
from diffdistill.distillers.distribution_matching.matching import check_gan_weights
from diffdistill.distillers.distribution_matching.sid_lsg import SiDLSG, generator_loss
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.errors import UserError, require_at_least
from diffdistill.generator import Renoise, Until
from diffdistill.networks.roles import Networks
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw

__all__ = ["SiDFewStep", "generator_loss", "linear_times"]


def linear_times(t_init: float, num_steps: int) -> tuple[float, ...]:
    """t_k = t_init (1 - (k - 1) / K), k = 1..K; K is the full number of steps also where a rollout stops early."""
    return tuple(t_init * (1 - k / num_steps) for k in range(num_steps))


class SiDFewStep(SiDLSG):
    """Beside SiD-LSG's: t_init, num_steps: of the linear grid where times is None; t_init None is t_max.
    gan_weight, critic_gan_weight: 0 and 0 is no GAN, no real data."""

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        t_init: float | None,
        num_steps: int,
        renoise: Renoise,
        until: Until,
        student_law: TimeLaw,
        critic_law: TimeLaw,
        weight: SampleWeight,
        critic_weight: losses.DenoisingWeight,
        alpha: float,
        critic_scale: float | None,
        gap_scale: float | None,
        projection_scale: float | None,
        null_share: float,
        gan_weight: float,
        critic_gan_weight: float,
    ) -> None:
        if times is None:
            process = networks["student"].process
            times = linear_times(process.t_max if t_init is None else t_init, num_steps)
            process.check_times("distiller.t_init, distiller.num_steps", times)
        elif t_init is not None:
            raise UserError("t_init", "must be null where times are given", t_init, "Give one of the two.")
        super().__init__(
            networks, times, renoise, until, student_law, critic_law, weight, critic_weight,
            alpha, critic_scale, gap_scale, projection_scale, null_share,
        )  # fmt: skip
        self.gan_weight, self.critic_gan_weight = gan_weight, critic_gan_weight

    @classmethod
    def needs(  # type: ignore[override]
        cls, num_steps: int = 1, gan_weight: float = 0.0, critic_gan_weight: float = 0.0, **hyperparameters: Any
    ) -> frozenset[str]:
        require_at_least(1, num_steps=num_steps)
        check_gan_weights(gan_weight, critic_gan_weight, (1e-3, 1))
        return super().needs(**hyperparameters) | ({"x0"} if gan_weight else set())

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        terms = {"sid": self.matched(x0, eps, t, batch.cond).mean()}
        if self.gan_weight:  # under the condition also where the fake has none: here it alone carries it
            logits = encoder_gan.logits_at(self.fake_score, self.add_noise(x0, eps, t), t, batch.cond)
            terms["gan"] = self.gan_weight * losses.gan_generator(logits).mean()
        return Loss(terms)

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        found = super().critic_loss(batch, rng)
        if not self.gan_weight:
            return found
        assert batch.x0 is not None
        rng = self.stream(rng).fork("gan")
        x0 = batch.memo["rollout"].x0.detach()
        t, eps = self.noise(self.critic_law, x0, rng)
        loss, gap = encoder_gan.discriminator(self.fake_score, batch.x0, x0, t, eps, batch.cond)
        terms = {**found.terms, "gan": self.critic_gan_weight * loss.mean()}
        return Loss(terms, {"logit_gap": gap.mean()})
