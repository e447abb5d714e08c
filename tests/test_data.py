"""Data sets: laws, epochs, independence of process count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffdistill.config import compose
from diffdistill.data import Digits, GaussianData, Mixture2D, digit_scans, epoch_indices
from diffdistill.errors import UserError
from diffdistill.networks.exact import circle
from diffdistill.recipe import assemble
from diffdistill.rng import Rng

X0 = frozenset({"x0"})


def test_scans_are_the_packaged_ones_in_range() -> None:
    images, labels = digit_scans()
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_every_scan_comes_once_per_epoch_in_an_order_of_its_own() -> None:
    size, batch = 60, 20
    steps = [epoch_indices(Rng(1, step, "data", range(batch)), batch, size) for step in range(6)]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(size))
    assert not np.array_equal(first, second)
    other = np.concatenate([epoch_indices(Rng(2, step, "data", range(batch)), batch, size) for step in range(3)])
    assert not np.array_equal(first, other)


def test_an_epoch_may_end_inside_a_batch() -> None:
    found = np.concatenate([epoch_indices(Rng(0, step, "data", range(7)), 7, 10) for step in range(10)])
    assert [sorted(found[i : i + 10]) for i in range(0, 70, 10)] == [list(range(10))] * 7


def test_micro_batches_and_ranks_deal_out_one_global_batch() -> None:
    data = Digits()
    whole = data.batch(Rng(0, 3, "data", range(8)), 8, X0, torch.float32)
    parts = [data.batch(Rng(0, 3, "data", range(first, first + 4)), 8, X0, torch.float32) for first in (0, 4)]
    assert whole.x0 is not None
    assert torch.equal(whole.x0, torch.cat([part.x0 for part in parts if part.x0 is not None]))
    assert torch.equal(whole.cond["label"], torch.cat([part.cond["label"] for part in parts]))


def test_labels_are_those_of_the_scans_and_uniform_without_them() -> None:
    data, (images, labels) = Digits(), digit_scans()
    batch = data.batch(Rng(0, 0, "data", range(64)), 64, X0, torch.float32)
    assert batch.x0 is not None
    for image, label in zip(batch.x0, batch.cond["label"], strict=True):
        here = (images == image).flatten(1).all(1).nonzero()
        assert label in labels[here]
    free = data.batch(Rng(0, 0, "data", range(5000)), 5000, frozenset(), torch.float32)
    assert free.x0 is None
    counts = torch.bincount(free.cond["label"], minlength=10).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 27.9  # chi-square, 9 degrees, p = .001


def test_the_mixture_has_its_modes_and_its_exact_reference() -> None:
    reference = Mixture2D().reference()
    assert reference.labels is not None
    for mode, centre in enumerate(circle()):
        points = reference.data[reference.labels == mode]
        assert torch.allclose(points.mean(0), torch.tensor(centre, dtype=torch.float32), atol=0.008)
        assert points.std(0).tolist() == pytest.approx([0.05, 0.05], rel=0.1)


def test_gaussian_rows_are_classes() -> None:
    data = GaussianData(((-1.0,), (2.0,)), ((0.1,), (0.3,)))
    batch = data.batch(Rng(0, 0, "data", range(4000)), 4000, X0, torch.float64)
    assert batch.x0 is not None
    second = batch.x0[batch.cond["label"] == 1]
    assert float(second.mean()) == pytest.approx(2.0, abs=0.03)
    assert float(second.std()) == pytest.approx(0.3, rel=0.06)
    assert GaussianData().num_classes == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=gmm2d", "networks=digits"], r"samples of the data's shape \[2\], got a UNet for \[1, 8, 8\]"),
        (["networks.config.in_channels=3"], r"shape \[1, 8, 8\], got a UNet for \[3, 8, 8\]"),
        (["networks.config.out_channels=2"], r"shape \[1, 8, 8\]"),
        (["networks.config.sample_size=16"], r"shape \[1, 8, 8\], got a UNet for \[1, 16, 16\]"),
        (["networks.config.num_class_embeds=10"], "one class row per class of the data, 10, and one more for the null"),
    ],
)
def test_a_unet_for_other_data_is_refused_before_any_work(words: list[str], said: str) -> None:
    base = [] if words[0].startswith("data=") else ["data=digits", "networks=digits_scratch"]
    settings = compose("train", [*base, "distiller=denoising", "run_dir=none", *words])
    with pytest.raises(UserError, match=said):
        assemble(settings, "meta")  # type: ignore[arg-type]
