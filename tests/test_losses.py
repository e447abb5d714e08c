"""losses: the losses that methods share, against their formulas and their minimisers."""

from __future__ import annotations

import pytest
import torch

from diffdistill.denoiser import Denoiser
from diffdistill.losses import (
    EDMWeight,
    PseudoHuber,
    denoising,
    gan_discriminator,
    gan_generator,
    sample_mean,
    unit_weight,
)
from diffdistill.networks.exact import Gaussian
from diffdistill.process import EDM, VP, F, expand

MEAN, STD = 0.7, 1.3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("process", [EDM(), VP()])
@pytest.mark.parametrize("weight", [unit_weight, EDMWeight(0.5)])
def test_the_gradient_of_denoising_vanishes_at_the_posterior_mean_and_nowhere_near(process, weight):
    n = 40_000
    x0, eps = MEAN + STD * randn(n, 1), randn(n, 1, seed=1)
    level = 0.3 * (process.t_max if isinstance(process, VP) else 5)
    t = torch.full((n,), level, dtype=torch.float64)

    def scores(mean):
        """Gradients of the samples' losses by the mean, in units of their standard error."""
        network = Gaussian(process, [[mean]], [[STD]], trainable=True)
        losses = denoising(Denoiser(network), x0, eps, t, {}, weight)
        x_t = process.add_noise(x0, eps, t)
        gap = Denoiser(network)(x_t, t, {}) - x0
        (total,) = torch.autograd.grad(losses.mean(), network.mean)
        each = weight(t, process)[:, None] * 2 * gap  # up to the constant d D / d mean
        return float(total / (each.detach().std() / n**0.5))

    assert abs(scores(MEAN)) < 4
    assert scores(MEAN + 0.2) > 4
    assert scores(MEAN - 0.2) < -4


def test_denoising_is_the_weighted_mean_square_over_coordinates():
    x0, eps, t = randn(3, 2, 4), randn(3, 2, 4, seed=1), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    view = Denoiser(Gaussian(EDM(), [[0.0]], [[1.0]]))
    x_t = x0 + expand(t, x0) * eps
    flat = denoising(view, x0.reshape(24, 1), eps.reshape(24, 1), t.repeat_interleave(8), {}, EDMWeight(0.5))
    by_hand = (1 / t**2 + 4) * ((x_t / (1 + t**2)[:, None, None] - x0) ** 2).mean((1, 2))
    torch.testing.assert_close(flat.view(3, 8).mean(1), by_hand)


@pytest.mark.parametrize("process", [EDM(), VP()])
def test_edm_weight_is_unit_weight_on_the_raw_output(process):
    t = torch.tensor([0.05, 0.3, 0.8], dtype=torch.float64) * min(process.t_max, 1000)
    alpha, sigma = process.alpha_sigma(t)
    if isinstance(process, EDM):
        c_out = F(0.5).x0_from(process, t)[1]
        torch.testing.assert_close(EDMWeight(0.5)(t, process), 1 / c_out**2)
    torch.testing.assert_close(EDMWeight(0.5)(t, process), (alpha / sigma) ** 2 + 4)


def test_pseudo_huber_is_quadratic_near_zero_and_the_norm_far_away():
    a, c = randn(4, 3, 2), 0.03
    norm = a.flatten(1).norm(dim=1)
    torch.testing.assert_close(PseudoHuber(c)(a, torch.zeros_like(a)), (norm**2 + c**2).sqrt() - c)
    torch.testing.assert_close(PseudoHuber(1.0)(1e-4 * a, 0 * a), (1e-4 * norm) ** 2 / 2, rtol=1e-4, atol=1e-14)
    torch.testing.assert_close(PseudoHuber(c)(1e4 * a, 0 * a), 1e4 * norm - c, rtol=1e-9, atol=0)


def test_the_best_discriminator_is_the_log_density_ratio():
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    real, fake = 0.8, 0.3  # densities at one point
    optimizer = torch.optim.LBFGS([logit], max_iter=50, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = real * gan_discriminator(logit, torch.full_like(logit, -1e3)) + fake * gan_discriminator(
            torch.full_like(logit, 1e3), logit
        )
        loss.sum().backward()
        return loss

    optimizer.step(closure)
    assert float(logit.detach()) == pytest.approx(torch.tensor(real / fake).log().item(), abs=1e-5)


def test_the_generators_gan_loss_falls_as_its_samples_look_real():
    logits = torch.tensor([-2.0, 0.0, 2.0])
    torch.testing.assert_close(gan_generator(logits), torch.log1p(torch.exp(-logits)))
    assert (gan_generator(logits).diff() < 0).all()


def test_sample_mean_keeps_the_batch():
    x = randn(2, 3, 4, 4)
    torch.testing.assert_close(sample_mean(x), x.mean((1, 2, 3)))
