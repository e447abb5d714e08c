"""diffusers: UNet2DModel as a network, with the maps of diffusers' consistency scheduler."""

from __future__ import annotations

import pytest
import torch

from diffdistill import UserError
from diffdistill.denoiser import Denoiser
from diffdistill.networks.diffusers import unet2d, unet2d_from_config
from diffdistill.networks.lora import LoraSpec
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import EDM, BoundaryF

CONFIG = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "num_class_embeds": 4,
}


def tiny(tame=False, seed=0, **config):
    return unet2d_from_config({**CONFIG, **config}, 0.5, 0.002, 20.0, tame, seed)


def batch(n=3):
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.002, 0.5, 20.0])[:n]
    return torch.randn(n, 1, 4, 4, generator=generator) * (0.25 + t[:, None, None, None] ** 2).sqrt(), t, labels(n)


def labels(n=3):
    return {"label": torch.arange(n)}


def test_the_denoiser_is_what_diffusers_consistency_scheduler_makes_of_the_unet():
    from diffusers import CMStochasticIterativeScheduler

    network = tiny()
    stock = CMStochasticIterativeScheduler(4, sigma_min=0.002, sigma_max=20.0, sigma_data=0.5, clip_denoised=False)
    stock.set_timesteps(4)
    x, _, cond = batch(1)
    for timestep, sigma in zip(stock.timesteps, stock.sigmas, strict=False):
        raw = network.unet(stock.scale_model_input(x, timestep), timestep, class_labels=cond["label"]).sample
        wanted = stock.step(raw, timestep, x, generator=torch.manual_seed(0)).prev_sample
        torch.manual_seed(0)
        last = timestep == stock.timesteps[-1]
        following = 0.002 if last else float(stock.sigmas[stock.step_index])
        noise = torch.randn(x.shape, generator=torch.manual_seed(0)) * (following**2 - 0.002**2) ** 0.5
        got = Denoiser(network)(x, sigma[None].float(), cond) + noise
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_scale_and_time_are_the_maps_of_the_scheduler():
    from diffusers import CMStochasticIterativeScheduler

    stock = CMStochasticIterativeScheduler(40, sigma_min=0.002, sigma_max=20.0, sigma_data=0.5)
    stock.set_timesteps(40)
    network, sigmas = tiny(), stock.sigmas[:40].float()
    torch.testing.assert_close(network.time(sigmas), stock.timesteps.float(), rtol=1e-5, atol=1e-3)
    for timestep, scale in zip(stock.timesteps, network.scale(sigmas), strict=True):
        stock._init_step_index(timestep)
        torch.testing.assert_close(scale, stock.scale_model_input(torch.ones(()), timestep).float(), rtol=1e-5, atol=0)
    assert network.process == EDM(0.002, 20.0)
    assert network.kind == BoundaryF(0.5, 0.002)


def test_at_t_min_the_denoiser_returns_its_input_bit_for_bit():
    x, _, cond = batch()
    assert torch.equal(Denoiser(tiny())(x, torch.full((3,), 0.002), cond), x)


def test_the_last_class_row_is_null_and_a_model_without_classes_has_none():
    assert tiny().null["label"].tolist() == [3]
    free = tiny(num_class_embeds=None)
    assert free.null is None
    x, t, _ = batch()
    assert Denoiser(free)(x, t, {}).shape == x.shape


def test_the_bottleneck_is_the_middle_block():
    network = tiny()
    x, t, cond = batch()
    assert len(network.blocks) == 5
    assert network.blocks[2] is network.unet.mid_block
    assert Denoiser(network).features(x, t, cond, (2,))[0].shape == (3, 16, 2, 2)


def test_heads_are_built_on_its_feature_maps():
    roles = {"fake_score": Role(), "discriminator": Role(init=None, build="heads", reads="fake_score")}
    networks = Networks(tiny(), roles, (1, 4, 4), {"label": torch.tensor([0])})
    heads = networks["discriminator"]
    x, t, cond = batch()
    with networks["fake_score"].record(heads.layers) as found:
        networks["fake_score"](x, t, cond)
    logits = heads({layer: outputs[0] for layer, outputs in found.items()})
    assert heads.layers == (2,)
    torch.testing.assert_close(logits[1:2], heads({2: found[2][0][1:2]}))


# -- tamed time embedding -----------------------------------------------------------------------------------------


def slow_columns(network):
    """Columns of linear_1 whose sinusoid is no faster than 1/250 of the time fed."""
    half = network.unet.time_proj.num_channels // 2
    shift = network.unet.time_proj.downscale_freq_shift
    frequency = torch.tensor([10_000.0 ** (-k / (half - shift)) for k in range(half)])
    return torch.cat([frequency <= 1 / 250, frequency <= 1 / 250])


def weight(network):
    """linear_1's weight as a checkpoint holds it."""
    return network.state_dict()["unet.time_embedding.linear_1.weight"]


def held(network):
    return weight(network)[:, ~slow_columns(network)]


def train(networks, steps=4, weight_decay=0.01):
    networks.train_only(("student",))
    optimizer = torch.optim.AdamW(networks.weights("student"), 0.02, weight_decay=weight_decay)
    for _ in range(steps):
        networks.zero_grad()
        networks["student"](*batch()).square().sum().backward()
        optimizer.step()
    networks.train_only(())


def test_tamed_columns_are_those_whose_frequency_exceeds_one_in_250():
    network, stock = (tiny(tame, block_out_channels=[32, 32]) for tame in (True, False))
    slow = slow_columns(network)
    assert slow.tolist() == ([False] * 10 + [True] * 6) * 2
    assert torch.equal(weight(network)[:, slow], weight(stock)[:, slow])
    assert not held(network).any()
    assert held(stock).any()


def test_tamed_columns_stay_zero_through_training_and_the_state_dict_is_stock():
    networks = Networks(tiny(tame=True), {"student": Role()}, (1, 4, 4), {"label": torch.tensor([0])})
    before = weight(networks.teacher).clone()
    train(networks)
    student = networks["student"].network
    assert not held(student).any()
    assert (weight(student) - before).abs().max() > 1e-3
    stock = tiny(seed=1)
    assert set(student.state_dict()) == set(stock.state_dict())
    stock.load_state_dict(student.state_dict())
    assert torch.equal(Denoiser(stock)(*batch()), networks["student"](*batch()))


def test_an_adapter_on_a_tamed_layer_merges_into_a_stock_checkpoint():
    torch.manual_seed(0)
    networks = Networks(
        tiny(tame=True), {"student": Role()}, (1, 4, 4), {"label": torch.tensor([0])}, {"student": "lora"}, LoraSpec(4)
    )
    train(networks)
    stock = tiny(seed=1)
    stock.load_state_dict(networks.standalone("student").state_dict())
    assert not held(stock).any()
    assert (networks["student"](*batch()) - networks["teacher"](*batch())).abs().max() > 1e-2
    torch.testing.assert_close(Denoiser(stock)(*batch()), networks["student"](*batch()), rtol=1e-3, atol=1e-4)


def test_a_tamed_network_varies_slowly_in_the_log_of_the_noise_level():
    tame, wild = tiny(tame=True), tiny()
    x, t = batch(1)[0].expand(64, -1, -1, -1), torch.exp(torch.linspace(0.0, 0.1, 64))
    cond = {"label": torch.zeros(64, dtype=torch.long)}

    def roughness(network):
        out = network(x, network.time(t), cond).flatten(1)
        return out.diff(n=2, dim=0).abs().mean() / out.diff(dim=0).abs().mean()

    assert roughness(tame) < roughness(wild) / 5


# -- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tame", [False, True])
def test_a_saved_folder_comes_back_as_the_same_network_and_is_stock(tmp_path, tame):
    network = tiny(tame=tame).eval()
    network.unet.save_pretrained(tmp_path)
    again = unet2d(str(tmp_path), 0.5, 0.002, 20.0, has_null=True, tame=False).eval()
    assert torch.equal(Denoiser(again)(*batch()), Denoiser(network)(*batch()))


def test_equal_seeds_give_equal_weights():
    assert all(torch.equal(a, b) for a, b in zip(tiny().parameters(), tiny().parameters(), strict=True))
    assert not torch.equal(tiny().unet.conv_in.weight, tiny(seed=1).unet.conv_in.weight)


def test_a_folder_without_a_unet_and_a_config_with_an_unknown_key_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"path must hold a diffusers UNet2DModel"):
        unet2d(str(tmp_path), 0.5, 0.002, 20.0, has_null=True, tame=False)
    with pytest.raises(UserError, match=r"config.depth is not a key of UNet2DModel"):
        tiny(depth=3)
