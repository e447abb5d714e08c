"""Logits of discriminator heads that read another role's blocks."""

from __future__ import annotations

from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.networks.discriminator import Heads


def logit(heads: Heads, view: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Logit [B] of noised samples (x_t, t), positive for real; the network stops after the last block that is read."""
    features = view.features(x_t, t, cond, heads.layers)
    return heads(dict(zip(heads.layers, features, strict=True)))
