"""The Wan network and the small parts that make a pipeline of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffdistill.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.moving_digits import MovingDigits, prompts
from diffdistill.networks.wan import PROMPTS, Wan, wan, wan_from_config
from diffdistill.process import RectifiedFlow
from diffdistill.solvers import flow_shift

CONFIG = {
    "patch_size": [1, 2, 2], "num_attention_heads": 1, "attention_head_dim": 16, "in_channels": 1, "out_channels": 1,
    "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1,
}  # fmt: skip
TABLE = Path(__file__).parents[2] / "diffdistill" / "assets" / "moving_digits" / PROMPTS


@pytest.fixture(scope="module")
def network() -> Wan:
    return wan_from_config(CONFIG, "asset:moving_digits", 0)


def test_it_predicts_the_velocity_at_a_thousand_t(network: Wan) -> None:
    x, t, cond = torch.randn(2, 1, 2, 16, 16), torch.tensor([0.3, 0.8]), {"label": torch.tensor([3, 80])}
    with torch.no_grad():
        raw = network.transformer(x, 1000 * t, network.prompts[cond["label"]], return_dict=False)[0]
        x0 = Denoiser(network)(x, t, cond)
    assert torch.allclose(x0, x - t.view(-1, 1, 1, 1, 1) * raw, atol=1e-6)


def test_it_is_checked_against_the_data(network: Wan) -> None:
    data = MovingDigits()
    network.check(data.shape, data.num_classes)
    for shape, classes, what in (
        ((1, 8, 8), 80, "shape"),
        ((3, 16, 32, 32), 80, "shape"),
        ((1, 16, 31, 32), 80, "must cut the data.s height, 31, into whole patches, got patches of"),
        ((1, 16, 32, 32), 10, "prompt for each"),
    ):
        with pytest.raises(UserError, match=what):
            network.check(shape, classes)


def test_a_folder_without_prompts_or_transformer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=PROMPTS):
        wan(str(tmp_path))
    (tmp_path / PROMPTS).write_bytes(TABLE.read_bytes())
    with pytest.raises(UserError, match="WanTransformer3DModel"):
        wan(str(tmp_path))
    with pytest.raises(UserError, match="config"):
        wan_from_config({**CONFIG, "heads": 2}, "asset:moving_digits", 0)


def test_a_saved_folder_reads_back(network: Wan, tmp_path: Path) -> None:
    network.transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / PROMPTS).write_bytes(TABLE.read_bytes())
    again = wan(str(tmp_path))
    x, cond = torch.randn(1, 1, 1, 16, 16), {"label": torch.tensor([0])}
    ours, theirs = (w(x, torch.tensor([500.0]), cond) for w in (network, again))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_grid_of_video_models() -> None:
    assert flow_shift(RectifiedFlow(), 4, 5.0) == pytest.approx((1.0, 0.9375, 2.5 / 3, 0.625, 0.0))
    assert flow_shift(RectifiedFlow(), 2, 1.0) == (1.0, 0.5, 0.0)


# -- the parts beside the transformer --------------------------------------------------------------------------


def test_the_shipped_prompts_are_what_the_text_encoder_answers() -> None:
    pytest.importorskip("transformers")
    from diffdistill.wan_parts import embedded

    table = load_file(TABLE)["prompts"]
    assert len(table) == len(prompts())
    assert torch.allclose(embedded(prompts()), table, atol=1e-5)
    distance = torch.cdist(table.flatten(1), table.flatten(1)) + torch.eye(len(table)) * 100
    assert float(distance.min()) > 1  # every prompt is told from every other


def test_the_vae_is_the_identity() -> None:
    from diffdistill.wan_parts import identity_vae

    vae, x = identity_vae(), torch.rand(1, 1, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(vae.decode(x).sample, x.expand(1, 3, 5, 16, 16), atol=1e-5)
        assert torch.allclose(vae.encode(x.expand(1, 3, 5, 16, 16)).latent_dist.mode(), x, atol=1e-5)
