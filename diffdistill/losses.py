"""Losses that two or more methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.errors import UserError, require_positive
from diffdistill.process import NoiseProcess

# (t, process) -> weight [B] of the squared x0 error
DenoisingWeight = Callable[[Tensor, NoiseProcess], Tensor]
# (a, b), each [B, ...] -> [B]
Distance = Callable[[Tensor, Tensor], Tensor]


def sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch, [B]."""
    return x.flatten(1).mean(1)


@dataclass(frozen=True)
class EDMWeight:
    """alpha^2/sigma^2 + 1/sigma_data^2: unit weight on EDM's raw output. Karras et al. 2022, arXiv:2206.00364."""

    sigma_data: float

    def __post_init__(self) -> None:
        require_positive(sigma_data=self.sigma_data)

    def __call__(self, t: Tensor, process: NoiseProcess) -> Tensor:
        alpha, sigma = process.alpha_sigma(t)
        return (alpha / sigma).square() + self.sigma_data**-2


def unit_weight(t: Tensor, process: NoiseProcess) -> Tensor:
    """1 on the x0 error."""
    return torch.ones_like(t)


def truncated_snr(t: Tensor, process: NoiseProcess) -> Tensor:
    """max(alpha^2/sigma^2, 1): the larger of the errors of x0 and noise. Salimans & Ho 2022, arXiv:2202.00512."""
    alpha, sigma = process.alpha_sigma(t)
    return (alpha / sigma).square().clamp(min=1)


def clipped_snr(t: Tensor, process: NoiseProcess) -> Tensor:
    """min(alpha^2/sigma^2, 5): min-SNR-5 on the x0 error. Hang et al. 2023, arXiv:2303.09556."""
    alpha, sigma = process.alpha_sigma(t)
    return (alpha / sigma).square().clamp(max=5)


def eps_weight(t: Tensor, process: NoiseProcess) -> Tensor:
    """alpha^2/sigma^2: the squared error of the noise prediction. Ho et al. 2020, arXiv:2006.11239."""
    alpha, sigma = process.alpha_sigma(t)
    return (alpha / sigma).square()


def alpha_eps_weight(t: Tensor, process: NoiseProcess) -> Tensor:
    """alpha^4/sigma^2: the error of the noise prediction times alpha, squared (SwiftBrush, arXiv:2312.05239)."""
    alpha, sigma = process.alpha_sigma(t)
    return (alpha.square() / sigma).square()


def velocity_weight(t: Tensor, process: NoiseProcess) -> Tensor:
    """(alpha' - sigma' alpha/sigma)^2: the squared error of the velocity, flow matching's loss (arXiv:2210.02747)."""
    alpha, sigma = process.alpha_sigma(t)
    alpha_rate, sigma_rate = process.rates(t)
    return (alpha_rate - sigma_rate * alpha / sigma).square()


def denoising(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond, weight: DenoisingWeight) -> Tensor:
    """weight(t) |D(x_t, t) - x0|^2, mean over coordinates, [B]. Minimised by E[x0 | x_t] whatever the weight."""
    x_t = denoiser.process.add_noise(x0, eps, t)
    return weight(t, denoiser.process) * sample_mean((denoiser(x_t, t, cond) - x0).square())


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(|a - b|^2 + c^2) - c with the norm over all coordinates, [B]. Song & Dhariwal 2023, arXiv:2310.14189.

    c: in the data's unit; the paper takes .00054 sqrt(number of coordinates).
    """

    c: float

    def __post_init__(self) -> None:
        if not 0 < self.c < float("inf"):  # at 0 the gradient of the norm does not exist where a == b
            raise UserError("c", "must be > 0", self.c, "The paper takes .00054 sqrt(number of coordinates).")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sqrt((a - b).flatten(1).square().sum(1) + self.c**2) - self.c


def squared(a: Tensor, b: Tensor) -> Tensor:
    """(a - b)^2, mean over coordinates, [B]."""
    return sample_mean((a - b).square())


def gan_generator(fake: Tensor) -> Tensor:
    """softplus(-logit) of generated samples, [B]; logits are positive for real."""
    return softplus(-fake)


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-real) + softplus(fake), [B]."""
    return softplus(-real) + softplus(fake)
