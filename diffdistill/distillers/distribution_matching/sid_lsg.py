"""SiD-LSG: SiD under classifier-free guidance of teacher and fake score, the fake guided while it is trained too.

Paper: Zhou et al. 2024, Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image
Generation, arXiv:2406.01561.
Headline: SD1.5, COCO-30k FID 8.15.

    L_student = E w [ <D_target^k4 - D_fake^k2, D_fake^k3 - x0> + (1 - alpha) |D_target^k4 - D_fake^k2|^2 ]
    L_critic  = E v(t) |D_fake^k1(x_t, t) - sg[x0]|^2,   c replaced by the null condition in a share of the samples

D^k = D_null + k (D_c - D_null).  k4: the run's `guidance.scale`; k1 (critic_scale), k2 (gap_scale) and k3
(projection_scale) follow it where they are null, as the paper recommends (1.5 to 4.5, all equal).  k1 = ... = k4 = 1
is SiD.  With k1 != 1 only the k1-guided fake is a denoiser of the student's samples.  The critic steps first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffdistill import losses
from diffdistill.condition import dropped
from diffdistill.denoiser import Cond, Denoiser, Guidance
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.sid import SiD
from diffdistill.distillers.distribution_matching.terms import Ratio, identity, noised, weighted
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.errors import UserError
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
    projected: Denoiser | None = None,
    ratio: Ratio | None = None,
) -> Tensor:
    """w [<gap, D_projected - x0> + (1 - alpha) |gap|^2], means over coordinates, [B], gap = D_target - D_fake.

    x0, eps: [B, *shape]; t: [B]. fake_score: under k2.  projected: the fake under k3, None where k3 = k2 (one pass).
    ratio: a further factor, detached.
    """
    n = noised(target, fake_score, x0, eps, t, cond, through=True, projected=projected)
    return weighted(n, cond, weight, ratio) * identity(n, alpha)


class SiDLSG(SiD):
    """Beside SiD's: critic_scale, gap_scale, projection_scale: k1, k2, k3, None is the teacher's guidance.
    null_share: of samples whose critic sees no condition, in [0, 1)."""

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
        critic_scale: float | None,
        gap_scale: float | None,
        projection_scale: float | None,
        null_share: float,
    ) -> None:
        super().__init__(networks, times, renoise, until, student_law, critic_law, weight, critic_weight, alpha)
        self.critic_scale, self.gap_scale, self.projection_scale = critic_scale, gap_scale, projection_scale
        self.null_share = null_share

    @classmethod
    def needs(
        cls,
        critic_scale: float | None = None,
        gap_scale: float | None = None,
        projection_scale: float | None = None,
        null_share: float = 0.0,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        if not 0 <= null_share < 1:
            raise UserError("null_share", "must lie in [0, 1)", null_share, "SiD-LSG: 0.1; SiD-DiT: 0.")
        guided = any(scale not in (None, 1) for scale in (critic_scale, gap_scale, projection_scale))
        return frozenset({"null"} if guided or null_share else set())

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        return Loss({"sid": self.matched(x0, eps, t, batch.cond).mean()})

    def matched(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The generator loss, [B]."""
        gap, projected = self.fake(self.gap_scale), self.fake(self.projection_scale)
        return generator_loss(
            self.target,
            gap,
            x0,
            eps,
            t,
            cond,
            weight=self.weight,
            alpha=self.alpha,
            projected=None if self.projection_scale == self.gap_scale else projected,
        )

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.critic_samples(batch, rng)
        t, eps = self.noise(self.critic_law, x0, rng)
        cond = dropped(batch.cond, self.networks.teacher.null, self.null_share, rng)
        loss = losses.denoising(self.fake(self.critic_scale), x0, eps, t, cond, self.critic_weight)
        return Loss({"denoising": loss.mean()})

    def fake(self, scale: float | None) -> Denoiser:
        """The fake score under a scale of its own, or under the teacher's guidance."""
        if scale is None:
            return self.fake_score.guided(self.target.guidance)
        if scale == 1:
            return self.fake_score
        null = {key: value.to(self.networks.device) for key, value in self.networks.teacher.null.items()}
        return self.fake_score.guided(Guidance(scale, null))
