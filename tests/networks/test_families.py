"""Each family's network, sampled by this package, is its stock pipeline: process, kind, times, packing and guidance."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_families import LENGTH, TINY, Tiny
from torch import Tensor

from diffdistill.denoiser import Denoiser, Guidance
from diffdistill.errors import UserError
from diffdistill.networks.families.flux import flux
from diffdistill.networks.families.packing import pack, unpack
from diffdistill.networks.families.sd3 import sd3
from diffdistill.networks.families.stable_diffusion import stable_diffusion
from diffdistill.networks.files import quiet_libraries
from diffdistill.networks.scheduled import Schedule, schedule_of
from diffdistill.process import EDM, RectifiedFlow
from diffdistill.solvers import ddim, flow_shift, sample

STEPS = 4
B = 2
# pipeline class, its parts' keyword for the model, keywords of its call, and the scale it is guided by
STOCK: dict[str, tuple[str, dict[str, Any], float]] = {
    "sd15": ("StableDiffusionPipeline", {"height": 64, "width": 64}, 3.0),
    "sd21": ("StableDiffusionPipeline", {"height": 64, "width": 64}, 1.0),
    "sdxl": ("StableDiffusionXLPipeline", {"height": 64, "width": 64, "original_size": (64, 48),
                                           "target_size": (64, 48)}, 2.5),
    "pixart": ("PixArtAlphaPipeline", {"height": 64, "width": 64, "use_resolution_binning": False,
                                     "negative_prompt": None}, 3.0),
    "sd3": ("StableDiffusion3Pipeline", {"height": 64, "width": 64}, 3.0),
    "flux": ("FluxPipeline", {"height": 64, "width": 64}, 3.5),
    # guided, this pipeline also rescales the result, which is not guidance here
    "qwen_image": ("QwenImagePipeline", {"height": 64, "width": 64}, 1.0),
    "sana": ("SanaPipeline", {"height": 256, "width": 256, "use_resolution_binning": False,
                                     "negative_prompt": None}, 3.0),
    "wan": ("WanPipeline", {"height": 64, "width": 64, "num_frames": 9}, 3.0),
    "cogvideox": ("CogVideoXPipeline", {"height": 64, "width": 64, "num_frames": 9}, 3.0),
    "ltx_video": ("LTXPipeline", {"height": 128, "width": 128, "num_frames": 9, "frame_rate": 25}, 3.0),
    "hunyuan_video": ("HunyuanVideoPipeline", {"height": 32, "width": 32, "num_frames": 9}, 6.0),
}  # fmt: skip
OWN_SCALE = ("flux", "hunyuan_video")  # fed to the model


def pipeline(tiny: Tiny, model: Any, name: str) -> Any:
    """The stock pipeline around the model, without the parts that a call with embeddings does not touch."""
    cls = getattr(diffusers, name)
    parts = {key for key, p in inspect.signature(cls.__init__).parameters.items() if p.default is p.empty}
    scheduler = type(tiny.scheduler).from_config(tiny.scheduler.config)
    given = {"scheduler": scheduler, tiny.build.part: model}
    with quiet_libraries():
        found = cls(**{key: given.get(key) for key in (parts | given.keys()) - {"self"}})
    found.set_progress_bar_config(disable=True)
    return found


def told(name: str, cond: dict[str, Tensor], null: dict[str, Tensor], guided: bool) -> dict[str, Any]:
    """The conditions as the pipelines name them."""
    words: dict[str, Any] = {"prompt_embeds": cond["text"]}
    no: dict[str, Any] = {"negative_prompt_embeds": null["text"]}
    if "pooled" in cond:
        words["pooled_prompt_embeds"], no["negative_pooled_prompt_embeds"] = cond["pooled"], null["pooled"]
    if "mask" in cond:
        mask = "prompt_embeds_mask" if name == "qwen_image" else "prompt_attention_mask"
        words[mask], no[f"negative_{mask}"] = cond["mask"], null["mask"]
    return {**words, **(no if guided else {})}


def stock_latents(name: str, z: Tensor) -> Tensor:
    """Noise in the layout the pipeline takes it."""
    if name in ("flux", "qwen_image"):
        return pack(z)
    if name == "cogvideox":
        return z.transpose(1, 2)
    return z.flatten(2).transpose(1, 2) if name == "ltx_video" else z


def own_layout(name: str, x: Tensor, like: Tensor) -> Tensor:
    if name in ("flux", "qwen_image"):
        return unpack(x, *like.shape[-2:])
    if name == "cogvideox":
        return x.transpose(1, 2)
    return x.transpose(1, 2).reshape(like.shape) if name == "ltx_video" else x


@pytest.mark.parametrize("name", STOCK)
def test_sampling_is_the_stock_pipeline_s(name: str) -> None:
    tiny = TINY[name]
    cls, call, scale = STOCK[name]
    network = tiny.network()
    network.check(tiny.shape, 0)
    cond, null = tiny.conditions(B), tiny.conditions(B, seed=7)
    z = torch.randn(B, *tiny.shape, generator=torch.Generator().manual_seed(3))
    stock = pipeline(tiny, network.model, cls)
    if name == "qwen_image":
        call = {**call, "true_cfg_scale": scale}
    else:
        call = {**call, "guidance_scale": scale}
    guided = scale > 1 and name not in OWN_SCALE
    with torch.no_grad():
        # the state at t_max has less noise than the unit that a pipeline draws where alpha is not 0 there
        start = network.process.alpha_sigma(torch.tensor([network.process.t_max], dtype=torch.float64))[1]
        latents = stock_latents(name, z * float(start))
        made = stock(**told(name, cond, null, guided), **call, num_inference_steps=STEPS, latents=latents,
                     output_type="latent")  # fmt: skip
    theirs = own_layout(name, made[0] if isinstance(made, tuple) else next(iter(made.values())), z)
    scheduler = stock.scheduler
    flow = isinstance(network.process, RectifiedFlow)
    times = tuple(scheduler.sigmas.tolist()) if flow else (*map(float, scheduler.timesteps.tolist()), 0.0)
    denoiser = Denoiser(network).guided(Guidance(scale, null) if guided else None)
    if name in OWN_SCALE:
        network.guidance = scale  # type: ignore[assignment]
    with torch.no_grad():
        ours = sample(denoiser, ddim, times, z, cond)
    assert float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())
    with torch.no_grad():  # the comparison can fail: the conditions matter
        other = sample(denoiser, ddim, times, z, {**cond, "text": cond["text"].flip(0)})
    assert float((other - theirs).abs().max()) > 1e-3 * float(theirs.abs().max())


def test_the_scheduler_s_shift_is_that_of_grids() -> None:
    """FlowMatchEuler moves the sigmas it is given by its shift: the even ones become this package's grid."""
    for name in ("sd3", "wan", "flux", "ltx_video"):
        tiny = TINY[name]
        network = tiny.network()
        network.check(tiny.shape, 0)
        given: dict[str, Any] = {"sigmas": [1 - i / STEPS for i in range(STEPS)]}
        if network.schedule.dynamic is not None:
            config = {key: network.schedule.dynamic[key] for key in ("base_shift", "max_shift")}
            ends = network.schedule.dynamic["base_image_seq_len"], network.schedule.dynamic["max_image_seq_len"]
            calculate = inspect.getmodule(diffusers.FluxPipeline).calculate_shift  # type: ignore[union-attr]
            given["mu"] = calculate(network.tokens(tiny.shape), *ends, *config.values())
        scheduler = type(tiny.scheduler).from_config(tiny.scheduler.config)
        scheduler.set_timesteps(**given)
        assert flow_shift(network.process, STEPS) == pytest.approx(tuple(scheduler.sigmas.tolist()), abs=1e-6), name


def test_packing_is_undone() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(unpack(pack(x), 4, 6), x)


def test_inpainting_reads_more_channels_than_it_draws() -> None:
    tiny = TINY["sd15"]
    wide = Tiny(tiny.build, {**tiny.keywords, "in_channels": 9}, tiny.scheduler, tiny.shape,
                {**tiny.cond, "concat": (5, 8, 8)})  # fmt: skip
    network = wide.network()
    network.check(tiny.shape, 0)
    x, t = torch.randn(B, *tiny.shape), torch.full((B,), 500.0)
    cond = wide.conditions(B)
    wanted = network.model(torch.cat([x, cond["concat"]], 1), t, cond["text"]).sample
    assert torch.equal(network(x, t, cond), wanted)
    with pytest.raises(UserError, match="must give the condition concat"):
        network(x, t, {"text": cond["text"]})


def test_a_scale_that_a_model_was_distilled_with_means_the_same() -> None:
    """LCM's pipeline embeds guidance_scale - 1: this package's w is guidance_scale itself."""
    tiny = TINY["sd15"]
    lcm = Tiny(tiny.build, {**tiny.keywords, "time_cond_proj_dim": 8}, tiny.scheduler, tiny.shape, tiny.cond)
    network = lcm.network()
    x, t, cond = torch.randn(B, *tiny.shape), torch.full((B,), 500.0), lcm.conditions(B)
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    w = torch.tensor([8.0, 2.0])
    stock = embed(None, w - 1, embedding_dim=8)  # type: ignore[arg-type]
    wanted = network.model(x, t, cond["text"], timestep_cond=stock).sample
    assert torch.allclose(network(x, t, {**cond, "w": w}), wanted, atol=1e-5)
    network.guidance = 8.0  # type: ignore[assignment]
    assert torch.allclose(network(x, t, cond)[0], wanted[0], atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny = TINY["sd3"]
    pipeline(tiny, tiny.model(), "StableDiffusion3Pipeline").save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def test_a_pipeline_folder_is_read(folder: Path) -> None:
    network, tiny = sd3(str(folder)), TINY["sd3"]
    assert network.schedule.shift == 3.0
    x, t, cond = torch.randn(B, *tiny.shape), torch.full((B,), 0.4), tiny.conditions(B)
    assert torch.equal(Denoiser(network)(x, t, cond), Denoiser(tiny.network())(x, t, cond))
    with torch.device("meta"):
        assert next(sd3(str(folder)).parameters()).is_meta


def test_what_a_folder_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"FluxTransformer2DModel.*SD3Transformer2DModel.*networks=sd3"):
        flux(str(folder))
    with pytest.raises(UserError, match=r"unet/config.json is missing.*It has scheduler, transformer"):
        stable_diffusion(str(folder))
    with pytest.raises(UserError, match=r"model_index.json.*Did you mean .*sd3"):
        sd3(str(tmp_path))
    with pytest.raises(UserError, match="folder or a hub id"):
        sd3("no such folder at all")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "Strange"}))
    with pytest.raises(UserError, match="must tell betas or a flow, got Strange"):
        sd3(str(folder))
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="scheduler_config.json is missing"):
        sd3(str(folder))


def test_a_hub_that_is_not_reached_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"on the hub and reachable.*hf download someone/something --local-dir DIR"):
        sd3("someone/something")


def test_samples_of_another_shape_are_refused() -> None:
    network = TINY["wan"].network()
    with pytest.raises(UserError, match="4 channels, .channels, frames, height, width."):
        network.check((4, 8, 8), 0)
    with pytest.raises(UserError, match="must give the condition text, got none"):
        network(torch.randn(1, 4, 3, 8, 8), torch.ones(1), {})


def test_schedules() -> None:
    edm = schedule_of({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5})
    stock = diffusers.EDMEulerScheduler()
    sigma = torch.tensor([0.01, 1.0, 50.0])
    assert edm.process == EDM(0.002, 80.0)
    for value, fed, scale in zip(sigma, edm.time(sigma), edm.scale(sigma), strict=True):
        assert float(fed) == pytest.approx(float(stock.precondition_noise(value)), rel=1e-6)
        one = torch.ones(1)
        assert float(scale) == pytest.approx(float(stock.precondition_inputs(one, value)), rel=1e-6)
        x0 = edm.process.convert(2 * one, 3 * one, value[None], edm.kind, schedule_of(_SAMPLE).kind)
        assert float(x0) == pytest.approx(float(stock.precondition_outputs(3 * one, 2 * one, value)), rel=1e-5)
    with pytest.raises(UserError, match="beta_schedule"):
        schedule_of({"_class_name": "DDIMScheduler", "beta_start": 0.1, "beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(UserError, match="invert_sigmas must be false"):
        schedule_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True})
    with pytest.raises(UserError, match="zero terminal SNR"):
        schedule_of({**_SAMPLE, "prediction_type": "epsilon", "rescale_betas_zero_snr": True})
    grown = Schedule(RectifiedFlow(), edm.kind, 1.0, dynamic={"base_shift": 0.5, "max_shift": 1.15})
    assert grown.shift_for(256) == pytest.approx(float(torch.e**0.5)) and grown.shift_for(4096) > grown.shift_for(256)


_SAMPLE = {"_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "sample"}


def test_the_length_of_prompts_is_used() -> None:
    """Masked tokens do not matter."""
    for name in ("pixart", "sana", "qwen_image", "ltx_video", "hunyuan_video"):
        tiny = TINY[name]
        network, cond = tiny.network(), tiny.conditions(B)
        x, t = torch.randn(B, *tiny.shape), network.process.t_max / 2 * torch.ones(B)
        noisy = torch.where(cond["mask"][..., None].bool(), cond["text"], 9.0 + torch.arange(LENGTH)[None, :, None])
        with torch.no_grad():
            a, b = (network(x, network.time(t), {**cond, "text": text}) for text in (cond["text"], noisy))
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize("name", TINY)
def test_features_are_the_picture_s(name: str) -> None:
    """Blocks of two streams return both, in either order: heads read the picture's, not as long as the text."""
    tiny = TINY[name]
    network = tiny.network()
    network.check(tiny.shape, tiny.cond.get("label", (0,))[0])
    denoiser = Denoiser(network)
    x, t = torch.randn(B, *tiny.shape), network.process.t_max / 2 * torch.ones(B)
    with torch.no_grad():
        found = denoiser.features(x, t, tiny.conditions(B), range(len(network.blocks)))
    for feature in found:
        assert feature.shape[0] == B and feature.shape[1] != LENGTH
        with torch.no_grad():
            other = denoiser.features(x + 1, t, tiny.conditions(B), [0])[0]
        assert not torch.equal(other, found[0])
