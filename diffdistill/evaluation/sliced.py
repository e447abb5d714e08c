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
    x, y = a.detach().flatten(1).double().cpu(), b.detach().flatten(1).double().cpu()
    directions = torch.randn(
        x.shape[1], num_projections, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    directions /= directions.norm(dim=0)
    n, m = len(x), len(y)
    # In units of 1/(n m), where all jumps are integers: no rounding decides which step a level falls on.
    jumps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = torch.diff(jumps, prepend=jumps.new_zeros(1)).double() / (n * m)
    step_x, step_y = (jumps - 1) // m, (jumps - 1) // n
    total = 0.0
    for block in directions.split(32, dim=1):
        px, py = (x @ block).sort(0).values, (y @ block).sort(0).values
        total += float((widths @ (px[step_x] - py[step_y]).square()).sum())
    return (total / num_projections) ** 0.5
