"""Fidelity and coverage by nearest neighbours: improved precision and recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# One k for all four, as Naeem et al.'s code has it. With k = 3 half of the digits' scans reach a precision of only .90
# against the other half (.955 with 5): it would not tell a good generator from the truth.
PRECISION_RECALL_K = 5
DENSITY_COVERAGE_K = 5
CHUNK = 1024  # rows per block of distances: 40 MB against 10,000 columns


@dataclass(frozen=True)
class PRDC:
    """Shares in [0, 1], but density, a mean count over k that may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(
    samples: Tensor,
    reference: Tensor,
    *,
    precision_recall_k: int = PRECISION_RECALL_K,
    density_coverage_k: int = DENSITY_COVERAGE_K,
) -> PRDC:
    """The four figures for samples [n, ...] against reference [m, ...]; n and m may differ.

    Let r_k(a; A) be the distance from a to its k-th nearest OTHER point of A (copies of a count as other points), and
    B_k(a; A) the closed ball of that radius.
    precision: share of samples in some B_k(x; reference), k = precision_recall_k.
    recall: share of reference points in some B_k(y; samples), same k. More samples make smaller balls, so recall falls
    as n grows with m fixed: compare it only at equal n.
    density: number of pairs (sample, reference point x) with the sample in B_k(x; reference), over k n,
    k = density_coverage_k; about 1 for fresh data.
    coverage: share of reference points x with at least one sample in B_k(x; reference), same k; rises with n.
    Distances are summed differences in float32, not dot products, so that a copy is at distance exactly 0.
    Raises ValueError where a set has no k-th other point.
    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1; Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 5 (with
    closed balls as in the first; the second's code uses open ones, which differs only where distances tie).
    """
    y, x = samples.flatten(1).float(), reference.flatten(1).float()
    radii_x = neighbour_distances(x, max(precision_recall_k, density_coverage_k))
    precision_radius, density_radius = radii_x[:, precision_recall_k - 1], radii_x[:, density_coverage_k - 1]
    recall_radius = neighbour_distances(y, precision_recall_k)[:, -1]

    precise = 0
    pairs = 0
    recalled = torch.zeros(len(x), dtype=torch.bool)
    covered = torch.zeros(len(x), dtype=torch.bool)
    for block, radius in zip(y.split(CHUNK), recall_radius.split(CHUNK), strict=True):
        distance = exact_distances(block, x)
        precise += int((distance <= precision_radius).any(1).sum())
        recalled |= (distance <= radius[:, None]).any(0)
        inside = distance <= density_radius
        pairs += int(inside.sum())
        covered |= inside.any(0)
    return PRDC(
        precision=precise / len(y),
        recall=float(recalled.double().mean()),
        density=pairs / (density_coverage_k * len(y)),
        coverage=float(covered.double().mean()),
    )


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [n, m] of a [n, d] and b [m, d]; exactly 0 for copies, and symmetric to the last bit."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distances(points: Tensor, k: int) -> Tensor:
    """Distances from each of points [n, d] to its k nearest other points, [n, k], ascending.  Needs n > k."""
    if len(points) <= k:
        raise ValueError(f"{k} nearest other points need more than {k} points, got {len(points)}")
    nearest = []
    for start in range(0, len(points), CHUNK):
        distance = exact_distances(points[start : start + CHUNK], points)
        rows = torch.arange(len(distance))
        distance[rows, start + rows] = torch.inf  # a point is not its own neighbour; its copies are
        nearest.append(distance.topk(k, largest=False, sorted=True).values)
    return torch.cat(nearest)
