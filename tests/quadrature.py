"""The quadrature bench: Gaussian data N(M, S^2), student x0 = a z + b, both denoisers exact, one noise level.

Expectations over (z, eps) are Gauss-Hermite sums, so a gradient in (a, b) has no sampling error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.networks.exact import Gaussian, gaussian_log_ratio
from diffdistill.process import NoiseProcess

ALPHA, SIGMA = 0.8, 0.6
TEACHER, LIGHT_TAILS = (0.7, 1.3), (0.1, 0.85)  # mean and std of the data
STUDENT = (-0.2, 0.9)  # b, a
TO_SCORES = ALPHA**2 / SIGMA**2  # of a first-order term; squared and over alpha^2 of a second-order one


@dataclass(frozen=True)
class Fixed(NoiseProcess):
    """alpha = .8, sigma = .6 at every time."""

    t_min: float = 0.0
    t_max: float = 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(t, ALPHA), torch.full_like(t, SIGMA)


def denoiser(mean: float, std: float, role: str = "teacher") -> Denoiser:
    return Denoiser(Gaussian(Fixed(), [[mean]], [[std]]), role)


def nodes(count: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Hermite nodes over (z, eps), [count^2, 1] each, and their weights."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    x, w = torch.from_numpy(x), torch.from_numpy(w / w.sum())
    z, eps = (axis.reshape(-1, 1) for axis in torch.meshgrid(x, x, indexing="ij"))
    return z, eps, torch.outer(w, w).reshape(-1)


def exact_ratio(target: Denoiser, fake: Denoiser) -> Callable[..., Tensor]:
    """r = p_target / p_fake at x_t."""
    return lambda x_t, t, cond: gaussian_log_ratio(target, fake, x_t, t, cond).exp()


def value_and_gradient(
    loss: Callable[..., Tensor],
    teacher: tuple[float, float] = TEACHER,
    student: tuple[float, float] = STUDENT,
    fake: tuple[float, float] | None = None,
    ratio: bool = False,
    **hyperparameters: Any,
) -> tuple[float, list[float]]:
    """The expectation of a generator loss and its gradient in (a, b). fake: (mean, std), None is the student's own."""
    z, eps, w = nodes()
    b, a = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in student)
    target, fake_score = denoiser(*teacher), denoiser(*(fake or student), role="fake_score")
    if ratio:
        hyperparameters["ratio"] = exact_ratio(target, fake_score)
    t = torch.full((len(z),), 0.5, dtype=torch.float64)
    total = (w * partial(loss, target, fake_score, a * z + b, eps, t, {})(**hyperparameters)).sum()
    return float(total.detach()), [float(g) for g in torch.autograd.grad(total, (a, b))]


def gradient(loss: Callable[..., Tensor], **arguments: Any) -> list[float]:
    """d/da, d/db."""
    return value_and_gradient(loss, **arguments)[1]
