"""Fréchet distance against closed forms, and its interval against the truth it claims to hold."""

import warnings

import numpy as np
import pytest
import torch

from diffdistill.data import digit_scans
from diffdistill.evaluation.frechet import (
    Moments,
    bootstrap_interval,
    frechet_distance,
    moments,
)


def symmetric_form(a, b):
    """The same distance by eigenvalues of the symmetric product, which is exact for singular covariances too."""
    values, vectors = np.linalg.eigh(b.cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ a.cov @ root).clip(0)).sum()
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * middle


def test_distance_of_axis_aligned_gaussians_is_the_closed_form():
    a = Moments(np.array([1.0, 0, 0]), np.diag([4.0, 1.0, 0.25]))
    b = Moments(np.array([0, -2.0, 0]), np.diag([1.0, 9.0, 0.25]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (1 - 3) ** 2, rel=1e-9)


def test_distance_of_covariances_that_do_not_commute_is_the_closed_form():
    a = Moments(np.zeros(2), np.array([[2.0, 0.9], [0.9, 1.0]]))
    b = Moments(np.zeros(2), np.array([[1.0, -0.5], [-0.5, 3.0]]))
    product = a.cov @ b.cov
    trace_of_root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))  # of any 2x2 matrix
    assert frechet_distance(a, b) == pytest.approx(2 + 1 + 1 + 3 - 2 * trace_of_root, rel=1e-9)


def test_moments_are_mean_and_unbiased_covariance_in_float64():
    values = 1000 + torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    flat = values.flatten(1).double()
    fit = moments(values)
    np.testing.assert_allclose(fit.mean, flat.mean(0).numpy(), rtol=1e-14)
    np.testing.assert_allclose(fit.cov, torch.cov(flat.T).numpy(), rtol=1e-10)


@pytest.mark.parametrize("num_samples", [1000, 30])
def test_singular_covariances_give_the_exact_distance_without_noise_on_the_terminal(num_samples, capsys):
    scans, _ = digit_scans()  # three pixels never vary
    few = scans[torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))[:num_samples]]
    a, b = moments(few), moments(scans)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = frechet_distance(a, b)
    assert distance == pytest.approx(symmetric_form(a, b), abs=1e-6)
    assert capsys.readouterr().out == ""


def test_covariances_that_share_no_direction_are_apart_by_their_traces():
    a = Moments(np.array([1.0, 2.0, 3.0]), np.diag([4.0, 0.0, 0.0]))
    b = Moments(np.array([1.0, 0.0, 0.0]), np.diag([0.0, 9.0, 1.0]))
    c = Moments(np.array([0.0, 0.0, 2.0]), np.diag([1.0, 0.0, 0.0]))  # shares one direction with a
    assert frechet_distance(a, c) == pytest.approx((2 - 1) ** 2 + 1 + 4 + 1)
    point = Moments(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(a, b) == pytest.approx(4 + 9 + 4 + 9 + 1)
    assert frechet_distance(point, b) == pytest.approx(1 + 9 + 1)
    assert frechet_distance(b, point) == pytest.approx(1 + 9 + 1)


def test_low_rank_covariances_with_constant_coordinates_give_the_exact_distance():
    rng = np.random.default_rng(0)
    for _ in range(60):
        d = int(rng.integers(2, 70))
        pair = []
        for rank in rng.integers(1, d + 1, 2):
            values = rng.standard_normal((rng.integers(rank + 1, 300), rank)) @ rng.standard_normal((rank, d))
            values[:, : rng.integers(0, d)] = -1.0
            pair.append(moments(torch.from_numpy(values)))
        a, b = pair
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # scipy warns of a root that may be inaccurate
            distance = frechet_distance(a, b)
        assert distance == pytest.approx(symmetric_form(a, b), abs=1e-6 * (1 + np.trace(a.cov)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_root_that_overflows_is_an_error_and_not_patched_by_a_diagonal():
    huge = Moments(np.zeros(2), np.array([[1e200, 0.0], [0.0, 2e200]]))
    with pytest.raises(ArithmeticError, match="no diagonal is added"):
        frechet_distance(huge, huge)


def test_replicates_by_counts_equal_replicates_by_copied_rows():
    samples = 5 + torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fixed = Moments(np.zeros(3), np.eye(3))
    seen = []

    def distance(drawn):
        seen.append(drawn)
        return frechet_distance(drawn, fixed)

    bootstrap_interval(samples, distance, seed=3, replicates=2)
    rng = np.random.default_rng(3)
    for drawn in seen[1:]:
        copied = moments(samples[torch.from_numpy(rng.integers(40, size=40))])
        np.testing.assert_allclose(drawn.mean, copied.mean, rtol=1e-12)
        np.testing.assert_allclose(drawn.cov, copied.cov, rtol=1e-9, atol=1e-12)


def test_interval_covers_the_truth_although_the_estimate_is_biased():
    d, n, shift, std = 8, 300, 0.1, 1.1
    fixed = Moments(np.zeros(d), np.eye(d))
    truth = d * shift**2 + d * (std - 1) ** 2
    covered, estimates = 0, []
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        samples = shift + std * torch.randn(n, d, generator=rng, dtype=torch.float64)
        estimate, (low, high) = bootstrap_interval(
            samples, lambda drawn: frechet_distance(drawn, fixed), seed=seed, replicates=100
        )
        covered += low <= truth <= high
        estimates.append(estimate)
    assert np.mean(estimates) > truth * 1.2  # so that an interval that ignored the bias would miss
    assert covered >= 34


def test_interval_repeats_with_its_seed_and_not_with_another():
    samples = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    reference = torch.randn(80, 2, generator=torch.Generator().manual_seed(1))
    fixed = moments(reference)
    first, again, other = (
        bootstrap_interval(samples, lambda drawn: frechet_distance(drawn, fixed), seed=seed, replicates=20)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first[0] == other[0]
    assert first[1] != other[1]


def test_gaussian_fitted_to_the_scans_without_classes_is_close_in_distance():
    scans, _ = digit_scans()
    fixed = moments(scans)
    values, vectors = np.linalg.eigh(fixed.cov)
    noise = np.random.default_rng(0).standard_normal((10_000, 64))
    blind = torch.from_numpy(fixed.mean + noise @ (vectors * np.sqrt(values.clip(0))).T)
    assert frechet_distance(moments(blind), fixed) == pytest.approx(0.012, abs=0.002)
