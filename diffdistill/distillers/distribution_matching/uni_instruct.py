"""Uni-Instruct: any f-divergence, expanded along the diffusion into ratio-weighted Fisher terms; the exact gradient.

Paper: Wang et al. 2025, Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction,
arXiv:2505.20755.
Headline: CIFAR-10 FID 1.46 (conditional 1.38), ImageNet-64 1.02.

    L_student = E w [ 2 h(r) <gap, D_fake - x0> + k(r) |gap|^2 + gan_weight B ],   h(r) = r^2 f''(r),  k = h - r h'

gap = D_target(x_t, t) - D_fake(x_t, t).  r = p_teacher / p_student at x_t, from the discriminator; as a function of x_t
its gradient is r times the score difference, alpha gap / sigma^2, and form=exact differentiates it so: the gradient is
then that of E h(r) |gap|^2 with D_fake and r following the student.  form=detached holds r still in h, which keeps
three of the four terms (exact in shifts, not in scale); form=projected keeps the first one alone, as the released
code does.  The reverse KL is twice SiD at alpha = 1/2.  B and the critic: SiDA's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.distribution_matching import encoder_gan
from diffdistill.distillers.distribution_matching.density_ratio import (
    Clamp,
    DensityRatio,
    KnownLogRatio,
    check_ratio,
    check_source,
)
from diffdistill.distillers.distribution_matching.divergences import DIVERGENCES, Name
from diffdistill.distillers.distribution_matching.sida import SiDA
from diffdistill.distillers.distribution_matching.terms import Noised, Ratio, fisher, noised, projection, weighted
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.generator import Renoise, Until
from diffdistill.networks.roles import Networks
from diffdistill.process import expand
from diffdistill.times import TimeLaw

Form = Literal["exact", "detached", "projected"]


def generator_loss(
    target: Denoiser,
    fake_score: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    weight: SampleWeight,
    divergence: Name,
    form: Form = "exact",
    ratio: Ratio | None = None,
    adversarial: Callable[[], Tensor] | None = None,
) -> Tensor:
    """w [2 h <gap, D_fake - x0> + k |gap|^2 + adversarial()], means over coordinates, [B].

    x0, eps: [B, *shape]; t: [B]. ratio: r, called after both networks, None is 1 everywhere.  adversarial: a scalar.
    At w = 1 and form=exact the gradient is sigma^4/alpha^2 that of E h(r) |s_target - s_fake|^2 at t.
    """
    n = noised(target, fake_score, x0, eps, t, cond, through=True)
    r = torch.ones_like(t) if ratio is None else ratio(n.x_t, t, cond).detach()
    moving = r if ratio is None else _moving(r, n)
    div = DIVERGENCES[divergence]
    loss = 2 * div.h(moving if form == "exact" else r) * projection(n)
    if form != "projected":
        loss = loss + div.k(moving) * fisher(n)
    return weighted(n, cond, weight) * (loss if adversarial is None else loss + adversarial())


def _moving(r: Tensor, n: Noised) -> Tensor:
    """r [B] whose gradient in x_t is r (s_target - s_fake)."""
    alpha, sigma = n.process.alpha_sigma(n.t)
    scores = expand(alpha / sigma.square(), n.x_t) * n.gap.detach()
    still = ((n.x_t - n.x_t.detach()) * scores).flatten(1).sum(1)  # 0, with the gradient of log r
    return r * (1 + still)


class UniInstruct(SiDA):
    """Beside SiDA's, without alpha: divergence: f.  form: of the gradient.  known_ratio, clamp, ratio_bins,
    ratio_rate: as f-distill's."""

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
        gan_weight: float,
        critic_gan_weight: float,
        student_from: int,
        gan_from: int,
        divergence: Name,
        form: Form,
        known_ratio: KnownLogRatio | None,
        clamp: Clamp,
        ratio_bins: int,
        ratio_rate: float,
    ) -> None:
        super().__init__(
            networks, times, renoise, until, student_law, critic_law, weight, critic_weight, 1.0,
            gan_weight, critic_gan_weight, student_from, gan_from,
        )  # fmt: skip
        self.divergence: Name = divergence
        self.form: Form = form
        self.ratio = DensityRatio(known_ratio, clamp, ratio_bins, ratio_rate)

    @classmethod
    def needs(  # type: ignore[override]
        cls,
        gan_weight: float = 0.0,
        divergence: Name = "rkl",
        known_ratio: KnownLogRatio | None = None,
        ratio_bins: int = 10,
        ratio_rate: float = 0.0,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        check_ratio(ratio_bins, ratio_rate)
        check_source(divergence, DIVERGENCES[divergence].needs_ratio, gan_weight, known_ratio is not None)
        return super().needs(gan_weight=gan_weight, **hyperparameters)

    def matched(
        self,
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Cond,
        adversarial: Callable[[], Tensor] | None,
        found: dict[int, list[Tensor]],
    ) -> Tensor:
        def ratio(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            logits = encoder_gan.recorded(found) if self.gan_weight else None
            log_ratio = None if logits is None else encoder_gan.mean_log_ratio(logits)
            return self.ratio.at(self.networks, x_t, t, cond, log_ratio)

        return generator_loss(
            self.target, self.fake_score, x0, eps, t, cond,
            weight=self.weight, divergence=self.divergence, form=self.form, ratio=ratio, adversarial=adversarial,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return self.ratio.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ratio.load_state_dict(state)
