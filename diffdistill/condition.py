"""Dropping conditions, so that a network also learns to do without."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.rng import Rng


def dropped(cond: Cond, null: Cond | None, share: float, rng: Rng, whole_batch: bool = False) -> Cond:
    """`cond` with the null condition in its place with probability `share`, per sample or for the whole global batch.

    null: batch 1; keys it lacks stay. At share 0 nothing is drawn. A method with a share > 0 needs `null`.
    """
    if not share or null is None:
        return cond
    size = len(rng)
    drop = rng.shared().uniform((1,)).expand(size) < share if whole_batch else rng.uniform((size,)) < share

    def pick(key: str, value: Tensor) -> Tensor:
        if key not in null:
            return value
        mask = drop.to(value.device).view(-1, *[1] * (value.ndim - 1))
        return torch.where(mask, null[key].to(value.device), value)

    return {key: pick(key, value) for key, value in cond.items()}
