"""How much a clip moves: the mean change from one frame to the next."""

from __future__ import annotations

import torch
from torch import Tensor


def movement(clips: Tensor) -> Tensor:
    """Root mean square difference of consecutive frames of clips [B, C, T, H, W], per clip [B], in units of values.

    Two frames of independent noise with standard deviation s differ by s sqrt(2), a still clip by 0.
    """
    if clips.shape[2] < 2:
        return clips.new_zeros(len(clips), dtype=torch.float64)
    return clips.double().diff(dim=2).square().flatten(1).mean(1).sqrt()


def movement_distance(a: Tensor, b: Tensor) -> float:
    """1-Wasserstein distance between the movements [n] and [m] of two sets of clips, in units of values."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(a.numpy(), b.numpy()))
