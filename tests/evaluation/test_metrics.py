"""The entry: what is measured, under which conditions it is refused, and that no single figure is enough."""

import pytest
import torch

from diffdistill.data import digit_scans
from diffdistill.errors import UserError
from diffdistill.evaluation.features import load_features
from diffdistill.evaluation.frechet import moments
from diffdistill.evaluation.metrics import METRICS, check_metrics, measure
from diffdistill.evaluation.reference import Reference


@pytest.fixture(scope="module")
def digits():
    images, labels = digit_scans()
    return Reference("digits", images, labels)


@pytest.fixture(scope="module")
def features():
    return load_features()


@pytest.fixture
def points():
    return Reference("points", torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), None)


def test_all_metrics_return_exactly_their_keys_and_a_resampler_shows_in_memorised(digits, features):
    drawn = torch.randint(1797, (1200,), generator=torch.Generator().manual_seed(0))
    others = ("clip_score", "modes", "kl", "w2", "frame_fd", "frame_fd_pixel", "velocity_error", "fid", "motion")
    asked = [name for name in METRICS if name not in others]  # what images have
    figures, protocol = measure(
        digits.data[drawn], digits.labels[drawn], digits, asked, features, seed=0, replicates=20
    )
    assert set(figures) == {
        "fd_pixel", "fd_pixel_ci", "fd", "fd_ci", "kid", "swd", "label_agreement",
        "precision", "recall", "density", "coverage", "memorised", "diversity", "diversity_reference",
    }  # fmt: skip
    assert figures["memorised"] == 1.0
    assert figures["label_agreement"] > 0.99
    assert figures["precision"] == 1.0
    assert figures["fd_pixel_ci"][0] < 0.02 < 0.1 < figures["fd_pixel"] + 0.05
    assert (protocol.num_samples, protocol.features, protocol.prdc_space) == (1200, features.sha256, "values")


def test_a_class_blind_gaussian_agrees_with_labels_by_chance(digits, features):
    fit = moments(digits.data)
    values, vectors = torch.linalg.eigh(torch.from_numpy(fit.cov))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(10_000, 64, generator=rng, dtype=torch.float64)
    blind = (torch.from_numpy(fit.mean) + noise @ (vectors * values.clamp_min(0).sqrt()).T).float().view(-1, 1, 8, 8)
    labels = torch.randint(10, (10_000,), generator=rng)
    figures, _ = measure(blind, labels, digits, ["fd_pixel", "label_agreement"], features, seed=0, replicates=2)
    assert figures["label_agreement"] == pytest.approx(0.105, abs=0.015)
    # .012 without clipping (test_frechet.py): clipping moves the mass that a Gaussian has beyond black and white.
    assert figures["fd_pixel"] == pytest.approx(0.74, abs=0.03)


def test_scans_with_shuffled_labels_score_well_in_distance_alone(digits, features):
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(1797, (10_000,), generator=rng)
    labels = torch.randint(10, (10_000,), generator=rng)
    figures, _ = measure(
        digits.data[drawn], labels, digits, ["fd_pixel", "label_agreement"], features, seed=0, replicates=2
    )
    assert figures["fd_pixel"] == pytest.approx(0.013, abs=0.004)
    assert figures["label_agreement"] == pytest.approx(0.1, abs=0.015)


def test_images_are_clipped_and_points_are_not(digits, points):
    loud = 3 * digits.data[:100]
    clipped, protocol = measure(loud, None, digits, ["swd"], None, seed=0)
    expected, _ = measure(loud.clamp(-1, 1), None, digits, ["swd"], None, seed=0)
    assert clipped == expected
    assert protocol.clip == (-1.0, 1.0)
    shifted = 10 + points.data
    figures, protocol = measure(shifted, None, points, ["swd", "prdc"], None, seed=0)
    assert figures["swd"] == pytest.approx(10, rel=0.1)
    assert figures["precision"] == 0
    assert (protocol.clip, protocol.prdc_space) == (None, "values")


def test_samples_that_are_not_finite_are_counted_and_refused(points):
    samples = points.data.clone()
    samples[3, 0] = torch.nan
    samples[9] = torch.inf
    with pytest.raises(UserError, match="samples must be finite, got 2 of 60 samples"):
        measure(samples, None, points, ["swd"], None, seed=0)


def test_samples_of_another_size_are_refused(digits):
    with pytest.raises(UserError, match=r"samples must have the shape of digits, \(1, 8, 8\) each, got \(1, 4, 4\)"):
        measure(torch.zeros(99, 1, 4, 4), None, digits, ["swd"], None, seed=0)


def test_an_unknown_metric_is_refused_with_the_list_under_the_callers_key(digits, features):
    with pytest.raises(UserError) as refusal:
        check_metrics(["fd", "inception_score"], digits, features, 10_000, key="metrics")
    assert str(refusal.value).startswith("metrics must be among fd_pixel, fd, kid,")
    assert "got inception_score." in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "smallest"), [("fd_pixel", 65), ("fd", 65), ("prdc", 6), ("kid", 2), ("swd", 1), ("memorised", 1)]
)
def test_num_samples_below_what_the_metric_needs_is_refused(digits, features, name, smallest):
    check_metrics([name], digits, features, smallest)
    with pytest.raises(UserError, match=f"num_samples must be at least {smallest} for the metric {name}"):
        check_metrics([name], digits, features, smallest - 1)


@pytest.mark.parametrize("name", ["fd", "kid", "label_agreement"])
def test_metrics_on_features_are_refused_without_a_network(digits, name):
    with pytest.raises(UserError, match="needs a feature network"):
        check_metrics([name], digits, None, 10_000)


def test_what_the_data_set_lacks_is_refused(digits, features):
    unlabelled = Reference("unlabelled", digits.data, None)
    with pytest.raises(UserError, match="label_agreement needs labels and unlabelled has none"):
        check_metrics(["label_agreement"], unlabelled, features, 10_000, classifier=features)
    with pytest.raises(UserError, match="clip_score needs prompts and digits has none"):
        check_metrics(["clip_score"], digits, features, 10_000)
    with pytest.raises(UserError, match="labels must be one class per sample"):
        measure(digits.data[:100], None, digits, ["label_agreement"], features, seed=0)
