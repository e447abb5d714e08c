"""planar: modes, exact Wasserstein distance and KL divergence of points against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from diffdistill.data import Mixture2D
from diffdistill.errors import UserError
from diffdistill.evaluation import planar
from diffdistill.evaluation.metrics import measure
from diffdistill.rng import Rng

DATA = Mixture2D()


def draw(count: int, seed: int = 0, data: Mixture2D = DATA) -> torch.Tensor:
    rng = Rng(seed, 0, "planar", range(count))
    return data._draw(rng, rng.integers(data.num_modes, (count,)), torch.float64)


def test_all_modes_of_the_data_are_recovered_and_nearly_all_samples_lie_near_one() -> None:
    count, share = planar.modes(draw(10_000), DATA)
    assert count == 8
    assert share == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # within 3 std in two dimensions


@pytest.mark.parametrize(("kept", "expected"), [(500, 7), (900, 8)])
def test_a_mode_is_recovered_at_one_sixteenth_of_all_samples(kept: int, expected: int) -> None:
    x = draw(10_000)
    thin = (x - DATA.centres[0]).norm(dim=1) < 0.2
    keep = ~thin
    keep[thin.nonzero()[:kept, 0]] = True
    rest = torch.cat([x[keep], draw(20_000, 1)[lambda_far(draw(20_000, 1))][: 10_000 - int(keep.sum())]])
    assert planar.modes(rest, DATA)[0] == expected


def lambda_far(x: torch.Tensor) -> torch.Tensor:
    return (x - DATA.centres[0]).norm(dim=1) > 0.2


def test_samples_between_the_modes_count_for_none() -> None:
    assert planar.modes(0.5 * draw(1000), DATA) == (0, 0.0)


def test_wasserstein_of_a_shifted_cloud_is_the_shift() -> None:
    x = draw(500)
    assert planar.wasserstein(x + torch.tensor([0.03, -0.04]), x) == pytest.approx(0.05, rel=1e-6)


def test_wasserstein_is_the_best_assignment_not_the_given_one() -> None:
    x = draw(300)
    assert planar.wasserstein(x[torch.randperm(300)], x) == pytest.approx(0.0, abs=1e-6)
    two = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert planar.wasserstein(two + torch.tensor([0.9, 0.0]), two) == pytest.approx(0.9)  # not 0.1 and 1.9


def test_kl_of_the_data_is_zero_and_of_a_missing_half_ln_2() -> None:
    x = draw(10_000)
    assert planar.kl(x, DATA) == pytest.approx(0.0, abs=0.03)
    twice = torch.cat([x, draw(10_000, 1)])
    half = twice[torch.cdist(twice, DATA.centres).argmin(1) < 4]
    assert planar.kl(half, DATA) == pytest.approx(math.log(2), abs=0.04)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_kl_of_modes_of_another_width_is_the_gaussian_one(factor: float) -> None:
    narrow = Mixture2D(std=0.05 * factor)
    expected = factor**2 - 1 - 2 * math.log(factor)  # two dimensions
    assert planar.kl(draw(10_000, data=narrow), DATA) == pytest.approx(expected, abs=0.05)


def test_the_density_integrates_to_one() -> None:
    axis = torch.linspace(-1.5, 1.5, 601, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    assert float(DATA.log_density(grid).exp().sum() * 0.005**2) == pytest.approx(1.0, rel=1e-6)


def test_measure_returns_them_and_refuses_them_where_no_density_is_known() -> None:
    reference = DATA.reference()
    figures, _ = measure(draw(200).float(), None, reference, ("modes", "w2", "kl"), None, seed=0)
    assert set(figures) == {"modes", "mode_share", "w2", "kl"}
    images = type(reference)("images", torch.zeros(20, 1, 2, 2), None)
    for name in ("modes", "w2", "kl"):
        with pytest.raises(UserError, match=name):
            measure(torch.zeros(20, 1, 2, 2), None, images, (name,), None, seed=0)
