"""TDM: distribution matching at every step of the student's own trajectory, each in a time interval of its own.

Paper: Luo et al. 2025, Learning Few-Step Diffusion Models by Trajectory Distribution Matching, arXiv:2503.06674.
Headline: PixArt-alpha in 4 steps beats its teacher in a user study after 500 iterations.

    k ~ uniform{1..K},   (x_{t_k}, x0 = G(x_{t_k}, t_k), x_s with s = t_{k+1}) on the student's DDIM trajectory
    tau ~ uniform[max(tau_min, s), t_k - margin],   x_tau = (alpha_tau / alpha_s) x_s + g eps
    L_student = E w dist(x0, sg[x0 - (D_fake(x_tau, tau, k) - D_target(x_tau, tau))])
    L_critic  = E v(tau) u |g' D_fake(x_tau, tau, k) - y'|^2

x_tau is noised from x_s, not from x0 (that would be DMD2).  g: the std that is added.  D_target: teacher (guided if
asked: the paper splits the guidance off, which is the same vector).  w: 1 / mean|x0 - D_target|.  (y', g', u): what the
fake score learns, `unbiased`: an estimate of E[x0 | x_tau] from x_s alone (Phased DMD, arXiv:2510.27684), or
`published`: the prediction x0 itself, which is biased wherever s > 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser, denoised
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.matching import DistributionMatching
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.errors import UserError
from diffdistill.generator import Renoise, Rollout, Until
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import EPS, X0, NoiseProcess, expand
from diffdistill.rng import Rng


@dataclass(frozen=True)
class ElementHuber:
    """sqrt((a - b)^2 + h^2) - h per coordinate, mean, [B]. h: in the data's unit; the paper's demo takes 1e-3.

    Its gradient saturates where |a - b| >> h: every coordinate pulls alike.
    """

    h: float

    def __post_init__(self) -> None:
        if not 0 < self.h < float("inf"):
            raise UserError("h", "must be > 0", self.h, "The paper's demo takes 1e-3.")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return losses.sample_mean(torch.sqrt((a - b).square() + self.h**2) - self.h)


@dataclass(frozen=True)
class Interval:
    """Where tau lies for a sample that goes from t_k to s; all in shares of the process's time range.

    lowest: of tau.  margin: between tau and the interval's upper end.  shared: the upper end is t_max for every step
    (then only the step input tells the fake score which distribution it is asked about), else t_k.
    """

    lowest: float = 0.02
    margin: float = 0.01
    shared: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.lowest < 1 and 0 <= self.margin < 1):
            found = (self.lowest, self.margin)
            raise UserError("lowest, margin", "must lie in [0, 1)", found, "The paper's demo: 0.02 and 0.01.")

    def ends(self, process: NoiseProcess, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end for each sample, [B]."""
        span = process.t_max - process.t_min
        low = torch.maximum(torch.full_like(s, process.t_min + self.lowest * span), s)
        upper = torch.full_like(t, process.t_max) if self.shared else t
        return low, upper - self.margin * span

    def draw(self, rng: Rng, process: NoiseProcess, t: Tensor, s: Tensor) -> Tensor:
        """tau [B], uniform."""
        low, high = self.ends(process, t, s)
        return low + (high - low) * rng.uniform((len(rng),), t.dtype)

    def check(self, process: NoiseProcess, times: Sequence[float]) -> None:
        """Refuse a grid between whose times an interval is empty."""
        for t, s in itertools.pairwise([*times, process.t_min]):
            low, high = self.ends(process, torch.tensor([t], dtype=torch.float64), torch.tensor([s]).double())
            if not float(low) < float(high):
                key = "distiller.interval, distiller.times"
                constraint = f"must leave room for tau between the times {t:g} and {s:g}"
                raise UserError(key, constraint, f"[{float(low):g}, {float(high):g}]", "Lower margin or lowest.")


@dataclass(frozen=True)
class FakeTarget:
    """What the fake score learns at (x_tau, tau): scale [B] times its x0 prediction is to be y [B, *shape].

    weight: [B], of the squared error.
    """

    scale: Tensor
    y: Tensor
    weight: Tensor


# (process, rollout, x_s, s, x_tau, tau, eps) -> FakeTarget
FakeTargetOf = Callable[[NoiseProcess, Rollout, Tensor, Tensor, Tensor, Tensor, Tensor], FakeTarget]


def unbiased(
    process: NoiseProcess, r: Rollout, x_s: Tensor, s: Tensor, x_tau: Tensor, tau: Tensor, eps: Tensor
) -> FakeTarget:
    """From x_s alone: the minimiser is E[x0 | x_tau] for any law of x_s. Phased DMD, arXiv:2510.27684.

    Scaled by g, weight clamp(1 / g^2, 0, 10): the target itself grows as 1 / g.
    """
    g, y = process.denoising_target(x_s, s, tau, eps)
    return FakeTarget(g, y, (1 / g.square().clamp(min=1e-12)).clamp(max=10))


def published(
    process: NoiseProcess, r: Rollout, x_s: Tensor, s: Tensor, x_tau: Tensor, tau: Tensor, eps: Tensor
) -> FakeTarget:
    """The student's prediction x0, weighted by the paper's ratio of noise densities to the power 1 / coordinates.

    Biased where s > 0, for the noise in x_s is not independent of x0: even a perfect trajectory gives another denoiser
    than the teacher's.
    """
    x0 = r.x0.detach()
    mixed = process.convert(x0, x_tau, tau, X0, EPS)
    ratio = torch.exp((losses.sample_mean(eps.square()) - losses.sample_mean(mixed.square())) / 2)
    return FakeTarget(torch.ones_like(tau), x0, ratio.to(tau.dtype))


def generator_loss(
    target: Denoiser,
    fake_score: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    weight: SampleWeight,
    distance: losses.Distance,
    x_s: Tensor | None = None,
    s: Tensor | None = None,
) -> Tensor:
    """w dist(x0, sg[x0 - (D_fake - D_target)]), [B]; only its gradient with respect to x0 has meaning.

    x0, eps: [B, *shape]; t: [B], tau above.  x_s [B, *shape] at s [B] is what is noised to t; None: x0 itself, clean.
    """
    process = target.process
    with torch.no_grad():
        x_t = process.add_noise(x0, eps, t) if x_s is None or s is None else process.diffuse(x_s, s, t, eps)
        d_target, d_fake = denoised((target, fake_score), x_t, t, cond)
        aim = x0 - (d_fake - d_target)
    return weight(x0, d_target, t, process).detach() * distance(x0, aim)


class TDM(DistributionMatching):
    """times, renoise, until: of the student's sampler, whose steps are matched.  interval: of tau.  weight: of one
    sample.  distance: of x0 and where it is to go.  fake_target: `unbiased` or `published`.  critic_weight: on its x0
    error.  random_s: s uniform between the next time and t_k - 2 margin instead of the next time, a regulariser.

    After the last step x_s is x0 itself, taken for a sample at t_min.
    """

    critic_first = False

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        until: Until,
        interval: Interval,
        weight: SampleWeight,
        distance: losses.Distance,
        fake_target: FakeTargetOf,
        critic_weight: losses.DenoisingWeight,
        random_s: bool,
    ) -> None:
        super().__init__(networks, times, renoise, until, None, None, weight, critic_weight)
        self.interval, self.distance, self.fake_target, self.random_s = interval, distance, fake_target, random_s
        interval.check(self.target.process, self.times)

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {**super().roles(), "fake_score": Role(inputs=("step",))}

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        self.student_samples(batch, rng)
        r: Rollout = batch.memo["rollout"]
        x_s, s, tau, eps = self.noised_point(r, rng.fork("student"))
        cond = {**batch.cond, "step": r.k}
        loss = generator_loss(
            self.target, self.fake_score, r.x0, eps, tau, cond,
            weight=self.weight, distance=self.distance, x_s=x_s, s=s,
        )  # fmt: skip
        return Loss({"tdm": loss.mean()})

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        self.critic_samples(batch, rng)
        r: Rollout = batch.memo["rollout"]
        x_s, s, tau, eps = self.noised_point(r, rng.fork("critic"))
        process = self.target.process
        x_tau = process.diffuse(x_s, s, tau, eps)
        found = self.fake_target(process, r, x_s, s, x_tau, tau, eps)
        predicted = self.fake_score(x_tau, tau, {**batch.cond, "step": r.k})
        error = losses.sample_mean((expand(found.scale, x_tau) * predicted - found.y).square())
        return Loss({"denoising": (self.critic_weight(tau, process) * found.weight * error).mean()})

    def noised_point(self, r: Rollout, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_s [B, *shape] without gradient, s [B], tau [B] and unit noise [B, *shape] of a rollout's step."""
        process = self.target.process
        x_s, s = r.x_out.detach(), r.s
        if self.random_s:
            margin = self.interval.margin * (process.t_max - process.t_min)
            s = s + (r.t - 2 * margin - s).clamp(min=0) * rng.uniform((len(rng),), s.dtype)
            x_s = self.renoise(process, r.x0.detach(), r.x_in, r.t, s, rng.normal(tuple(x_s.shape), x_s.dtype))
        tau = self.interval.draw(rng, process, r.t, s)
        return x_s, s, tau, rng.normal(tuple(x_s.shape), x_s.dtype)
