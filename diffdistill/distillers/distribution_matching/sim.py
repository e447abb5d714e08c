"""SIM: score implicit matching, the score difference under any distance; the pseudo-Huber one normalises itself.

Paper: Luo et al. 2024, One-Step Diffusion Distillation through Score Implicit Matching, arXiv:2410.16794.
Headline: CIFAR-10 FID 2.06 (conditional 1.96).

    L_student = E w <d'(gap), D_fake - x0>,   gap = D_target(x_t, t) - D_fake(x_t, t)
    L_critic  = E v(t) |D_fake(x_t, t) - sg[x0]|^2

d'(gap) = gap for the squared distance, which is SiD with alpha = 1;  gap / sqrt(|gap|^2 + c^2) for the pseudo-Huber
one, |.| over the whole sample and differentiated like the rest.  The gradient is that of E d(gap) with the law of x_t
held fixed.  The paper puts scores into d; here x0 predictions, so c is in the data's unit.  The critic steps first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.matching import DistributionMatching
from diffdistill.distillers.distribution_matching.terms import Ratio, noised, projection, weighted
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.errors import UserError
from diffdistill.generator import Renoise, Until
from diffdistill.networks.roles import Networks
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw

Metric = Literal["pseudo_huber", "l2"]


def generator_loss(
    target: Denoiser,
    fake_score: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    weight: SampleWeight,
    distance: Metric,
    c: float | None = None,
    ratio: Ratio | None = None,
) -> Tensor:
    """w <gap, D_fake - x0> for l2, the same / sqrt(|gap|^2 + c^2) for pseudo_huber; means over coordinates, [B].

    x0, eps: [B, *shape]; t: [B]. The norm sums over coordinates. ratio: a further factor, detached.
    """
    n = noised(target, fake_score, x0, eps, t, cond, through=True)
    w = weighted(n, cond, weight, ratio)
    if distance == "l2":
        return w * projection(n)
    assert c is not None
    return w * projection(n) / torch.sqrt(n.gap.flatten(1).square().sum(1) + c**2)


class SIM(DistributionMatching):
    """Beside DistributionMatching's: distance: d.  c: of pseudo_huber, in the data's unit; None is .00054 sqrt(number
    of coordinates), what consistency training takes (the paper's value is not public)."""

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
        distance: Metric,
        c: float | None,
    ) -> None:
        super().__init__(networks, times, renoise, until, student_law, critic_law, weight, critic_weight)
        self.distance: Metric = distance
        numel = int(torch.Size(networks.shape).numel())
        self.c = 0.00054 * numel**0.5 if c is None else c

    @classmethod
    def needs(cls, c: float | None = None, **hyperparameters: Any) -> frozenset[str]:
        if c is not None and not 0 < c < float("inf"):
            raise UserError("c", "must be > 0, or null", c, "It is in the data's unit, as the norm of a difference.")
        return frozenset()

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        loss = generator_loss(
            self.target,
            self.fake_score,
            x0,
            eps,
            t,
            batch.cond,
            weight=self.weight,
            distance=self.distance,
            c=self.c,
        )
        return Loss({"sim": loss.mean()})
