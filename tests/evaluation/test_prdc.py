"""Precision, recall, density and coverage against loops over their definitions."""

import pytest
import torch

from diffdistill.evaluation import prdc as module
from diffdistill.evaluation.prdc import PRDC, neighbour_distances, prdc


def by_definition(samples, reference, k_pr, k_dc):
    def gap(a, b):
        return (a - b).square().sum().sqrt().item()

    def radius(points, i, k):
        return sorted(gap(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    y, x = samples, reference
    n, m = len(y), len(x)
    near = [[gap(y[j], x[i]) <= radius(x, i, k_pr) for i in range(m)] for j in range(n)]
    dense = [[gap(y[j], x[i]) <= radius(x, i, k_dc) for i in range(m)] for j in range(n)]
    recalled = [any(gap(x[i], y[j]) <= radius(y, j, k_pr) for j in range(n)) for i in range(m)]
    return PRDC(
        precision=sum(any(row) for row in near) / n,
        recall=sum(recalled) / m,
        density=sum(sum(row) for row in dense) / (k_dc * n),
        coverage=sum(any(dense[j][i] for j in range(n)) for i in range(m)) / m,
    )


@pytest.mark.parametrize(("n", "m"), [(23, 17), (12, 31)])
def test_unequal_counts_agree_with_the_definitions(n, m, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)  # several blocks, the last one short
    rng = torch.Generator().manual_seed(n)
    samples = 0.7 + 1.3 * torch.randn(n, 3, generator=rng)
    reference = torch.randn(m, 3, generator=rng)
    ours = prdc(samples, reference, precision_recall_k=3, density_coverage_k=5)
    defined = by_definition(samples, reference, 3, 5)
    assert vars(ours) == pytest.approx(vars(defined), abs=1e-12)
    assert 0 < ours.precision < 1
    assert 0 < ours.recall < 1


def test_four_points_on_a_line_by_hand():
    reference = torch.tensor([[0.0], [1.0], [3.0], [6.0]])  # radii for k = 1: 1, 1, 2, 3
    samples = torch.tensor([[0.5], [0.5], [9.5]])  # radii for k = 1: 0, 0, 9
    got = prdc(samples, reference, precision_recall_k=1, density_coverage_k=1)
    # .5 is within 0 and 1's balls; 9.5 in none. The ball of 9.5 reaches down to .5: it holds 1, 3 and 6.
    assert got == PRDC(precision=2 / 3, recall=3 / 4, density=4 / 3, coverage=2 / 4)


def test_a_sample_exactly_on_the_sphere_is_inside():
    reference = torch.tensor([[0.0], [1.0]])
    samples = torch.tensor([[-1.0], [-5.0]])
    assert prdc(samples, reference, precision_recall_k=1, density_coverage_k=1).precision == 0.5


def test_copies_are_at_distance_zero_and_count_as_other_points():
    points = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).mul(100).repeat(2, 1)
    assert neighbour_distances(points, 1).eq(0).all()
    assert prdc(points, points[:4].repeat(2, 1), precision_recall_k=1, density_coverage_k=1).recall == 1


def test_fresh_data_has_density_near_one_and_a_collapsed_generator_covers_nothing():
    rng = torch.Generator().manual_seed(0)
    reference, fresh = torch.randn(800, 2, generator=rng), torch.randn(800, 2, generator=rng)
    good = prdc(fresh, reference)
    assert good.density == pytest.approx(1, abs=0.1)
    assert min(good.precision, good.recall, good.coverage) > 0.9
    collapsed = prdc(0.01 * fresh, reference)
    assert collapsed.precision == 1
    assert collapsed.recall < 0.05
    assert collapsed.coverage < 0.05


def test_too_few_points_for_k_are_refused():
    with pytest.raises(ValueError, match="more than 5 points, got 5"):
        prdc(torch.randn(9, 2), torch.randn(5, 2))
