"""The terms of the one generator loss that every distribution-matching method is made of.

    L = W [ a h pull + b h projection + c k fisher ],   gap = D_target(x_t, t) - D_fake(x_t, t)

    pull       = <sg[-gap], x0>          the network calls get no gradient; only x0 does
    projection = <gap, D - x0>           gradient through the inputs of both networks and through x0; D: D_fake, or
                                         another view of it
    fisher     = |gap|^2                 the same

All are means over coordinates, [B]. W: weight of a sample.  h, k: functions of the density ratio teacher / student,
1 without one.  With D_fake at its optimum, grad(projection + fisher / 2) is half the gradient of E|gap|^2 with D_fake
following the student, and grad(projection) half of it with the law of x_t held fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser, denoised
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.losses import sample_mean
from diffdistill.process import NoiseProcess

# (x_t, t, cond) -> [B], detached: the density ratio teacher / student of the marginals at t
Ratio = Callable[[Tensor, Tensor, Cond], Tensor]


@dataclass(frozen=True)
class Noised:
    """A student's sample x0, noised to (x_t, t), and what both networks make of it; all [B, *shape], t [B].

    d_projected: D of the projection.
    """

    process: NoiseProcess
    x0: Tensor
    x_t: Tensor
    t: Tensor
    d_target: Tensor
    d_fake: Tensor
    d_projected: Tensor

    @property
    def gap(self) -> Tensor:
        """D_target - D_fake."""
        return self.d_target - self.d_fake


def noised(
    target: Denoiser,
    fake_score: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    through: bool,
    projected: Denoiser | None = None,
) -> Noised:
    """Both networks at one x_t. through: with gradient through their input, else without any.  projected: another view
    of the fake score, for the projection."""
    process = target.process
    with torch.set_grad_enabled(through and torch.is_grad_enabled()):
        x_t = process.add_noise(x0, eps, t)
        views = (target, fake_score) if projected is None else (target, fake_score, projected)
        found = denoised(views, x_t, t, cond)
        return Noised(process, x0, x_t, t, found[0], found[1], found[-1])


def weighted(n: Noised, cond: Cond, weight: SampleWeight, ratio: Ratio | None = None) -> Tensor:
    """W of each sample, times the ratio if there is one, [B], detached."""
    w = weight(n.x0, n.d_target, n.t, n.process)
    return (w if ratio is None else w * ratio(n.x_t, n.t, cond)).detach()


def pull(n: Noised) -> Tensor:
    """<sg[D_fake - D_target], x0>, [B]; only its gradient has meaning."""
    return sample_mean(-n.gap.detach() * n.x0)


def projection(n: Noised) -> Tensor:
    """<gap, D - x0>, [B]: the factored form, which cancels less than <gap, D_target - x0> - |gap|^2."""
    return sample_mean(n.gap * (n.d_projected - n.x0))


def fisher(n: Noised) -> Tensor:
    """|gap|^2, [B]."""
    return sample_mean(n.gap.square())


def identity(n: Noised, alpha: float) -> Tensor:
    """<gap, D - x0> + (1 - alpha) |gap|^2, [B]: SiD's loss."""
    return projection(n) if alpha == 1 else projection(n) + (1 - alpha) * fisher(n)  # at 1 nothing cancels
