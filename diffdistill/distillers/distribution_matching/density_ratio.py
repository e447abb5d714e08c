"""The density ratio teacher / student of the noised marginals: where it comes from and how it is kept in bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.errors import UserError
from diffdistill.networks.roles import Networks
from diffdistill.process import NoiseProcess, wide

# (target, fake_score, x_t, t, cond) -> log r [B]: a ratio that is known, for closed-form networks
KnownLogRatio = Callable[[Denoiser, Denoiser, Tensor, Tensor, Cond], Tensor]


@dataclass(frozen=True)
class Clamp:
    """r held in [low, high]; f-distill's code takes .1 and 20."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < float("inf"):
            fix = "f-distill takes 0.1 and 20."
            raise UserError("low, high", "must satisfy 0 < low < high", (self.low, self.high), fix)

    def __call__(self, log_ratio: Tensor) -> Tensor:
        """r from log r, [B], at least float32."""
        log_ratio = log_ratio.to(wide(log_ratio.dtype))
        return log_ratio.exp().clamp(self.low, self.high)


class RatioHistogram:
    """Moving mean of r in bins of the noise level, so that a miscalibrated discriminator does not favour some times.

    E_student r = 1 at every t; dividing by the mean of a bin restores that.  num_bins: equal in ln(sigma / alpha) over
    the process's range (equal in sigma most samples would share one).  rate: share of the old mean, 0 is the current
    batch's mean alone.  Source: f-distill, arXiv:2502.15681, as in its code.
    """

    def __init__(self, num_bins: int, rate: float) -> None:
        self.num_bins, self.rate = num_bins, rate
        self.means = torch.full((num_bins,), float("nan"), dtype=torch.float64)  # nan: no sample fell in it yet

    def normalised(
        self, r: Tensor, t: Tensor, process: NoiseProcess, mean_over_ranks: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """r [B] divided by its bin's mean, which this batch, over all ranks, moves first. One collective."""
        index = self.bins(t, process)
        here = torch.nn.functional.one_hot(index, self.num_bins).to(torch.float64)
        sums, counts = mean_over_ranks(torch.stack([r.double() @ here, here.sum(0)])).cpu()
        new = sums / counts
        old = torch.where(self.means.isnan(), new, self.means)
        self.means = torch.where(counts > 0, self.rate * old + (1 - self.rate) * new, self.means)
        return r / self.means.to(r.device, r.dtype)[index]

    def bins(self, t: Tensor, process: NoiseProcess) -> Tensor:
        """The bin of each t, int64 [B]."""
        ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device=t.device)
        low, high = self._level(ends, process)
        share = (self._level(t.double(), process) - low) / (high - low)
        return (share * self.num_bins).long().clamp(0, self.num_bins - 1)

    @staticmethod
    def _level(t: Tensor, process: NoiseProcess) -> Tensor:
        return (
            process.angle(t).clamp(1e-4, torch.pi / 2 - 1e-4).tan().log()
        )  # finite where a process ends in pure noise


class DensityRatio:
    """r at (x_t, t), clamped and divided by its moving mean over noise levels.

    known: log r where it is known, None reads the discriminator's log ratio.  clamp: of r.  num_bins, rate: of the
    `RatioHistogram`.
    """

    def __init__(self, known: KnownLogRatio | None, clamp: Clamp, num_bins: int, rate: float) -> None:
        self.known, self.clamp, self.histogram = known, clamp, RatioHistogram(num_bins, rate)

    def at(self, networks: Networks, x_t: Tensor, t: Tensor, cond: Cond, log_ratio: Tensor | None) -> Tensor:
        """r [B], detached. log_ratio: the discriminator's [B]; None without one, which the reverse KL allows."""
        target: Denoiser = networks["target"]
        if self.known is not None:
            log_ratio = self.known(target, networks["fake_score"], x_t, t, cond)
        found = torch.zeros_like(t) if log_ratio is None else log_ratio.detach()
        return self.histogram.normalised(self.clamp(found), t, target.process, networks.mean)

    def state_dict(self) -> dict[str, Any]:
        """The histogram's means, [num_bins]."""
        return {"ratio_means": self.histogram.means.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.histogram.means = state["ratio_means"].clone()


def check_ratio(num_bins: int, rate: float) -> None:
    """Refuse what `RatioHistogram` cannot work with."""
    if not 1 <= num_bins <= 10_000:
        raise UserError("ratio_bins", "must lie in 1..10000", num_bins, "f-distill takes 10.")
    if not 0 <= rate < 1:
        raise UserError("ratio_rate", "must lie in [0, 1)", rate, "f-distill: 0, or 0.5 on ImageNet-64.")


def check_source(divergence: str, needs_ratio: bool, gan_weight: float, known: bool) -> None:
    """Refuse a divergence whose weight is a function of the ratio where nothing estimates the ratio."""
    if needs_ratio and not gan_weight and not known:
        raise UserError(
            "divergence",
            "needs the density ratio, which the GAN's discriminator estimates: gan_weight and critic_gan_weight > 0",
            divergence,
            "Switch the GAN on, or take rkl, the one divergence that needs no ratio.",
        )
