"""Sliced Wasserstein distance against closed forms."""

import pytest
import torch

from diffdistill.evaluation.sliced import sliced_wasserstein


@pytest.mark.parametrize("d", [2, 64])
def test_shifted_gaussians_are_the_shift_over_root_d_apart(d):
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(20_000, d, generator=rng)
    other = torch.randn(15_000, d, generator=rng)
    shift = torch.full((d,), 2.0)
    distance = sliced_wasserstein(points, other + shift, num_projections=512)
    assert distance == pytest.approx(float(shift.norm()) / d**0.5, rel=0.05)


def test_scaled_gaussians_are_the_difference_of_their_scales_apart():
    points = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    other = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1))
    assert sliced_wasserstein(points, 1.5 * other) == pytest.approx(0.5, rel=0.05)


def test_unequal_counts_equal_the_same_sets_repeated_to_a_common_count():
    rng = torch.Generator().manual_seed(0)
    six, four = torch.randn(6, 2, generator=rng), torch.randn(4, 2, generator=rng)
    direct = sliced_wasserstein(six, four)
    assert direct == pytest.approx(sliced_wasserstein(six.repeat(2, 1), four.repeat(3, 1)), rel=1e-12)
    assert sliced_wasserstein(six, six.repeat(5, 1)) == pytest.approx(0, abs=1e-12)


def test_two_levels_against_three_by_hand():
    # quantile steps 0|1 at 1/2 against 0|3|6 at 1/3, 2/3: squared gaps 0, 9, 4, 25 over 1/3, 1/6, 1/6, 1/3
    distance = sliced_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0], [6.0]]))
    assert distance**2 == pytest.approx(9 / 6 + 4 / 6 + 25 / 3)
