"""mlp: the small network for points."""

from __future__ import annotations

import pytest
import torch

from diffdistill import UserError
from diffdistill.denoiser import Denoiser
from diffdistill.networks.mlp import mlp, mlp_from_config
from diffdistill.process import EDM, F


def small(seed=0, num_classes=3):
    return mlp_from_config(0.5, 0.002, 20.0, 2, 16, 2, num_classes, seed)


def batch():
    t = torch.tensor([0.01, 0.1, 1.0, 10.0])
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), t, {"label": torch.tensor([0, 1, 2, 3])}


def test_it_feeds_a_unit_variance_state_and_a_quarter_of_the_log_noise_level():
    network = small()
    t = torch.tensor([0.1, 2.0], dtype=torch.float64)
    torch.testing.assert_close(network.scale(t), 1 / (0.25 + t**2).sqrt())
    torch.testing.assert_close(network.time(t), t.log() / 4)
    assert (network.process, network.kind) == (EDM(0.002, 20.0), F(0.5))


def test_equal_seeds_give_equal_weights_without_touching_torchs_generator():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    first = small()
    assert torch.equal(torch.rand(2), wanted)
    for a, b in zip(first.parameters(), small().parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.inlet.weight, small(seed=1).inlet.weight)


def test_the_output_depends_on_state_time_and_class():
    view, (x, t, cond) = Denoiser(small()), batch()
    out = view(x, t, cond)
    raw = view.network(x, view.network.time(t), cond)
    for other in ((x + 1, t, cond["label"]), (x, 2 * t, cond["label"]), (x, t, cond["label"].roll(1))):
        changed = view.network(other[0], view.network.time(other[1]), {"label": other[2]})
        assert (changed - raw).abs().amin(1).max() > 1e-4
    assert out.shape == x.shape
    assert torch.equal(small(num_classes=0)(x, t, {}), small(num_classes=0)(x, t, {}))


def test_the_null_condition_is_the_row_after_the_classes():
    assert small().null["label"].tolist() == [3]
    assert small().class_embedding.num_embeddings == 4
    assert small(num_classes=0).null is None


def test_a_saved_network_comes_back_bit_for_bit(tmp_path):
    network, (x, t, cond) = small(), batch()
    network.save(tmp_path / "net")
    again = mlp(str(tmp_path / "net"))
    assert torch.equal(Denoiser(again)(x, t, cond), Denoiser(network)(x, t, cond))
    assert again.process == network.process


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"path must hold config.json and model.safetensors"):
        mlp(str(tmp_path))
