"""Sliced 2-Wasserstein distance, exact per projection for unequal counts."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_PROJECTIONS = 256
PROJECTION_SEED = 0  # fixed: the same directions for every run, so that figures differ by the samples alone


def sliced_wasserstein(
    a: Tensor, b: Tensor, *, num_projections: int = NUM_PROJECTIONS, seed: int = PROJECTION_SEED
) -> float:
    """Root of the mean over random directions of W2^2 between the projections of a [n, ...] and b [m, ...].

    In the units of the values; N(0, I) against N(shift, I) in d dimensions gives |shift| / sqrt(d).  W2 in one
    dimension integrates the squared difference of the two quantile functions over (0, 1]. Both are steps, with jumps
    at i/n and j/m, so the sum over the merged jumps is exact.
    Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    rows = (projections(each, num_projections=num_projections, seed=seed) for each in (a, b))
    return distance_of_projections(*rows)


def projections(values: Tensor, *, num_projections: int = NUM_PROJECTIONS, seed: int = PROJECTION_SEED) -> Tensor:
    """Values [n, ...] along the random directions, float64 [n, num_projections]; the same directions for every set."""
    flat = values.detach().flatten(1).double().cpu()
    directions = torch.randn(
        flat.shape[1], num_projections, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return flat @ (directions / directions.norm(dim=0))


def distance_of_projections(a: Tensor, b: Tensor) -> float:
    """The sliced distance of two sets that are given along the directions, [n, p] and [m, p]."""
    n, m = len(a), len(b)
    # In units of 1/(n m), where all jumps are integers: no rounding decides which step a level falls on.
    jumps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = torch.diff(jumps, prepend=jumps.new_zeros(1)).double() / (n * m)
    step_a, step_b = (jumps - 1) // m, (jumps - 1) // n
    total = 0.0
    for one, other in zip(a.split(32, dim=1), b.split(32, dim=1), strict=True):
        along_a, along_b = one.sort(0).values, other.sort(0).values
        total += float((widths @ (along_a[step_a] - along_b[step_b]).square()).sum())
    return (total / a.shape[1]) ** 0.5
