"""The shipped feature network is the one its card describes."""

import hashlib
import json
import shutil

import pytest
import torch

from diffdistill.data import digit_scans
from diffdistill.errors import UserError
from diffdistill.evaluation.features import ASSET, accuracy, augment, load_features, split_scans, train


def test_split_is_stratified_disjoint_and_whole():
    _, labels = digit_scans()
    kept, held_out = split_scans(labels)
    assert (len(kept), len(held_out)) == (1437, 360)
    assert torch.cat([kept, held_out]).sort().values.equal(torch.arange(1797))
    expected = labels.bincount() * 360 / 1797
    assert ((labels[held_out].bincount() - expected).abs() <= 1).all()


def test_shipped_network_reaches_the_held_out_accuracy_of_its_card():
    images, labels = digit_scans()
    _, held_out = split_scans(labels)
    network = load_features()
    assert network.held_out_accuracy >= 0.985
    assert accuracy(network, images[held_out], labels[held_out]) == pytest.approx(network.held_out_accuracy, abs=1e-9)
    assert f"{network.held_out_accuracy:.4f}" in (ASSET / "README.md").read_text()
    assert network.sha256 == hashlib.sha256((ASSET / "model.safetensors").read_bytes()).hexdigest()
    assert network.sha256 in (ASSET / "README.md").read_text()
    assert sum(p.numel() for p in network.parameters()) <= 100_000


def test_logits_are_linear_in_the_features():
    images, _ = digit_scans()
    network = load_features()
    features = network.features(images[:50])
    assert features.shape == (50, 64)
    torch.testing.assert_close(network.logits(images[:50]), network.head(features))
    assert features.std(0).min() > 0.1  # no dead unit, so that the covariance has full rank


def test_altered_weights_are_refused(tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(ASSET, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=f"evaluation.features must hold the weights with sha256 {config['sha256']}"):
        load_features(folder)


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.features must be a folder with config\.json"):
        load_features(tmp_path)


def test_augmentation_shifts_by_at_most_half_a_pixel_and_keeps_black_borders():
    rng = torch.Generator().manual_seed(0)
    black = augment(torch.full((200, 1, 8, 8), -1.0), rng)
    assert black.mean() == pytest.approx(-1, abs=0.01)
    assert black.std() == pytest.approx(0.1, rel=0.05)
    dot = torch.full((2000, 1, 8, 8), -1.0)
    dot[:, :, 4, 4] = 1
    light = augment(dot, rng) + 1
    rows = (light.sum((1, 3)) * torch.arange(8)).sum(1) / 2 - 4  # displacement of the dot's centre, with noise
    assert rows.mean() == pytest.approx(0, abs=0.05)
    assert light.mean((0, 1))[2:7, 2:7].argmax() == 12
    assert light.mean((0, 1))[4, 4] == pytest.approx(2 * 0.75**2, rel=0.05)  # mean of (1 - |u|)^2 for u in [-.5, .5]


@pytest.mark.slow
def test_training_from_scratch_reaches_the_floor():
    images, labels = digit_scans()
    kept, held_out = split_scans(labels)
    assert accuracy(train(images[kept], labels[kept]), images[held_out], labels[held_out]) >= 0.985
