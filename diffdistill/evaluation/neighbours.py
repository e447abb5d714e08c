"""Memorisation: samples that sit closer to a reference image than any other reference image does."""

from __future__ import annotations

import torch
from torch import Tensor

from .prdc import CHUNK, exact_distances, neighbour_distances


def memorised(samples: Tensor, reference: Tensor) -> float:
    """Share of samples nearer (pixel L2) to their nearest reference image than that image is to its nearest other one.

    samples: [n, ...].  reference: [m, ...], at least two distinct images.
    Copies within the reference count once, so that "other" means a different image: a sample equal to an image that
    the reference holds twice is memorised, not excused by the twin at distance 0.
    A resampler of the reference gives 1.0. Fresh data of the same law does not give 0 but about one half, since both
    distances then have nearly one law: half of the digit scans against the other half give .42 to .50.
    Raises ValueError if fewer than two distinct reference images are given.
    """
    images = torch.unique(reference.flatten(1).float(), dim=0)
    spacing = neighbour_distances(images, 1)[:, 0]
    closer = 0
    for block in samples.flatten(1).float().split(CHUNK):
        distance, nearest = exact_distances(block, images).min(1)
        closer += int((distance < spacing[nearest]).sum())
    return closer / len(samples)
