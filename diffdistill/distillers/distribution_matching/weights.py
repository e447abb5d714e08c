"""Weights of one sample in the generator loss, [B] and detached: values that a configuration chooses.

Each is a function of (x0, D_target, t, process). The loss is a mean over coordinates of products of x0 predictions;
against a gradient in score units such a product carries sigma^2/alpha^2 (first order) or sigma^4/alpha^2 (second).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.process import NoiseProcess, wide

# (x0, D_target, t, process) -> [B], detached
SampleWeight = Callable[[Tensor, Tensor, Tensor, NoiseProcess], Tensor]


def unit(x0: Tensor, d_target: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """1: a score difference then has sigma^2/alpha^2 times the gradient of the KL divergence of the marginals at t."""
    return torch.ones_like(t)


def inverse_omega(x0: Tensor, d_target: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """1 / mean|x0 - D_target| per sample, floored at 1e-5 (DMD, arXiv:2311.18828, eq. 8)."""
    omega = losses.sample_mean((x0 - d_target).detach().abs().to(wide(x0.dtype)))
    return 1 / omega.clamp(min=1e-5)


def alpha_inverse_omega(x0: Tensor, d_target: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """alpha(t) / omega: DMD's equation with the scores put in; its code, and the name above, leave alpha out."""
    return process.alpha_sigma(t)[0] * inverse_omega(x0, d_target, t, process)


def alpha_sigma(x0: Tensor, d_target: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """alpha sigma: sigma^2 on the difference of two noise predictions (SwiftBrush, arXiv:2312.05239)."""
    alpha, sigma = process.alpha_sigma(t)
    return alpha * sigma


@dataclass(frozen=True)
class FlowPower:
    """(1 - u)^signal / u^noise with u = sigma / (alpha + sigma), which is t itself in rectified flow.

    SiD-DiT (arXiv:2509.25127) offers (1 - t), (1 - t)^2, 1/t, 1/t^2, (1 - t)/t and its square.
    """

    signal: float
    noise: float

    def __call__(self, x0: Tensor, d_target: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
        alpha, sigma = process.alpha_sigma(t)
        return (alpha / (alpha + sigma)) ** self.signal / (sigma / (alpha + sigma)) ** self.noise
