"""The discriminator without parameters of its own: channel means of the fake score's bottleneck are its logits.

Source: Zhou et al. 2024 (SiDA), arXiv:2410.14919. Its weights are the fake score's, so the critic's phase trains both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Cond, Denoiser

CLAMP = 10.0  # of logits, as in the paper's code


def bottleneck(denoiser: Denoiser) -> tuple[int]:
    """The middle one of the network's blocks."""
    return (len(denoiser.network.blocks) // 2,)


def logits(features: Tensor) -> Tensor:
    """Mean over channels, clamped: [B, C, *space] -> [B, *space]; real is positive."""
    return features.mean(1).clamp(-CLAMP, CLAMP)


def logits_at(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Logits of noised samples; the network stops at its bottleneck."""
    return logits(denoiser.features(x_t, t, cond, bottleneck(denoiser))[0])


def recorded(found: dict[int, list[Tensor]]) -> Tensor:
    """Logits of a call within `denoiser.record(bottleneck(denoiser))`; of a guided view its conditional call."""
    return logits(next(iter(found.values()))[0])


def per_sample(values: Tensor) -> Tensor:
    """Mean over the logit map, [B]."""
    return losses.sample_mean(values) if values.ndim > 1 else values


def mean_log_ratio(logit: Tensor) -> Tensor:
    """log(p_real / p_fake) per sample, [B]: the mean logit, detached."""
    return per_sample(logit).detach()


def discriminator(
    fake_score: Denoiser, real: Tensor, fake: Tensor, t: Tensor, eps: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """Half the sum of both binary cross-entropies [B], and the logit gap real - fake [B], at one (t, eps) for both."""
    size = len(real)
    both = torch.cat([real, fake])
    twice = {key: torch.cat([value, value]) for key, value in cond.items()}
    x_t = fake_score.process.add_noise(both, torch.cat([eps, eps]), torch.cat([t, t]))
    on_real, on_fake = logits_at(fake_score, x_t, torch.cat([t, t]), twice).split(size)
    loss = 0.5 * per_sample(losses.gan_discriminator(on_real, on_fake))
    return loss, (per_sample(on_real) - per_sample(on_fake)).detach()
