"""f-distill: DMD2's gradient weighted by a function of the density ratio, for any f-divergence.

Paper: Xu et al. 2025, One-step Diffusion Models with f-Divergence Distribution Matching, arXiv:2502.15681.
Headline: CIFAR-10 conditional FID 1.92 (forward KL), ImageNet-64 1.16 (JS).

    L_student = E w h(r) / E[h(r)] <sg[D_fake(x_t, t) - D_target(x_t, t)], x0> + gan_weight softplus(-l(x_t))
    L_critic  = as DMD2's, + r1_weight |l(y_t) - l(y_t + r1_std n)|^2

r = p_teacher(x_t) / p_student(x_t), read off the discriminator as exp(l) at this very x_t, clamped, and divided by its
moving mean in the bin of t.  h(r) = r^2 f''(r); 1 for the reverse KL, which is DMD2.  y: real data.  All factors of the
ratio are detached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.density_ratio import (
    Clamp,
    DensityRatio,
    KnownLogRatio,
    check_ratio,
    check_source,
)
from diffdistill.distillers.distribution_matching.divergences import DIVERGENCES, Name
from diffdistill.distillers.distribution_matching.dmd2 import DMD2, Features
from diffdistill.distillers.distribution_matching.terms import Ratio, noised, pull, weighted
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.errors import require_at_least, require_positive
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
    divergence: Name,
    ratio: Ratio | None = None,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """w h(r) <sg[D_fake - D_target], x0>, mean over coordinates, [B]; only its gradient in x0 has meaning.

    x0, eps: [B, *shape]; t: [B]. ratio: r, None is 1 everywhere.  mean: what h is divided by, a function of h [B] such
    as its mean over all ranks; None is not at all. At w = 1 the gradient is sigma^2/alpha^2 that of D_f at t.
    """
    n = noised(target, fake_score, x0, eps, t, cond, through=False)
    with torch.no_grad():
        r = torch.ones_like(t) if ratio is None else ratio(n.x_t, t, cond)
        h = DIVERGENCES[divergence].h(r)
        if mean is not None:
            h = h / mean(h)
    return weighted(n, cond, weight) * h * pull(n)


class FDistill(DMD2):
    """Beside DMD2's: divergence: f.  known_ratio: log r where it is known, None reads the discriminator.  clamp: of r.
    ratio_bins, ratio_rate: of its moving mean over noise levels.  r1_weight, r1_std: of the discriminator's smoothness
    on noised real data.
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
        gan_features: Features,
        divergence: Name,
        known_ratio: KnownLogRatio | None,
        clamp: Clamp,
        ratio_bins: int,
        ratio_rate: float,
        r1_weight: float,
        r1_std: float,
    ) -> None:
        super().__init__(
            networks, times, renoise, until, student_law, critic_law, gan_law, weight, critic_weight,
            student_every, gan_weight, critic_gan_weight, gan_features,
        )  # fmt: skip
        self.divergence: Name = divergence
        self.ratio = DensityRatio(known_ratio, clamp, ratio_bins, ratio_rate)
        self.r1_weight, self.r1_std = r1_weight, r1_std

    @classmethod
    def needs(  # type: ignore[override]
        cls,
        gan_weight: float = 0.0,
        divergence: Name = "rkl",
        known_ratio: KnownLogRatio | None = None,
        ratio_bins: int = 10,
        ratio_rate: float = 0.0,
        r1_weight: float = 0.0,
        r1_std: float = 0.1,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        check_ratio(ratio_bins, ratio_rate)
        check_source(divergence, DIVERGENCES[divergence].needs_ratio, gan_weight, known_ratio is not None)
        require_at_least(0, r1_weight=r1_weight)
        require_positive(r1_std=r1_std)
        return super().needs(gan_weight=gan_weight, **hyperparameters)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        logit = self.logit_at(self.add_noise(x0, eps, t), t, batch.cond) if self.gan_weight else None
        loss = generator_loss(
            self.target, self.fake_score, x0, eps, t, batch.cond,
            weight=self.weight, divergence=self.divergence, ratio=partial(self._ratio, logit), mean=self._mean,
        )  # fmt: skip
        terms = {"f": loss.mean()}
        if logit is not None:
            terms["gan"] = self.gan_weight * losses.gan_generator(logit).mean()
        return Loss(terms)

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        found = super().critic_loss(batch, rng)
        if not (self.r1_weight and self.gan_weight):
            return found
        assert batch.x0 is not None
        rng = self.stream(rng).fork("r1")
        t, eps = self.noise(self.gan_law, batch.x0, rng)
        y_t = self.add_noise(batch.x0, eps, t)
        near = y_t + self.r1_std * rng.normal(tuple(y_t.shape), y_t.dtype)
        change = self.logit_at(y_t, t, batch.cond) - self.logit_at(near, t, batch.cond)
        return Loss({**found.terms, "r1": self.r1_weight * change.square().mean()}, found.stats)

    def state_dict(self) -> dict[str, Any]:
        return self.ratio.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ratio.load_state_dict(state)

    def _ratio(self, logit: Tensor | None, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.ratio.at(self.networks, x_t, t, cond, logit)

    def _mean(self, h: Tensor) -> Tensor:
        return self.networks.mean(h.mean())
