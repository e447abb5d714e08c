"""The families' real diffusers classes at a size that runs in milliseconds, with conditions that fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from diffdistill.latents import write
from diffdistill.networks.families.dit import DiT
from diffdistill.networks.families.flux import Flux
from diffdistill.networks.families.pixart import PixArt
from diffdistill.networks.families.qwen_image import QwenImage
from diffdistill.networks.families.sana import Sana
from diffdistill.networks.families.sd3 import SD3
from diffdistill.networks.families.stable_audio import StableAudio
from diffdistill.networks.families.stable_diffusion import StableDiffusion
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.families.video import CogVideoX, HunyuanVideo, LTXVideo, WanVideo
from diffdistill.networks.scheduled import schedule_of

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
      "timestep_spacing": "trailing", "clip_sample": False}  # fmt: skip
LENGTH = 6  # of a prompt, tokens
GUIDANCE: dict[Any, float] = {StableDiffusion: 1.0, Flux: 3.5, HunyuanVideo: 6.0}  # as configs/networks has it


@dataclass(frozen=True)
class Tiny:
    """A family's model by its keywords, its scheduler, and what it is told. cond: of condition name to sizes."""

    build: Callable[..., Stock]
    keywords: dict[str, Any]
    scheduler: Any
    shape: tuple[int, ...]
    cond: dict[str, tuple[int, ...]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(diffusers, self.build.model_class)(**self.keywords)
            for parameter in model.parameters():  # zero-initialised outputs would hide what comes before them
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    def network(self, seed: int = 0) -> Stock:
        extra = {"guidance": GUIDANCE[self.build], **self.extra} if self.build in GUIDANCE else self.extra
        return self.build(self.model(seed), schedule_of(self.scheduler_config), **extra)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        if isinstance(self.scheduler, dict):
            return self.scheduler
        return {**self.scheduler.config, "_class_name": type(self.scheduler).__name__}

    def conditions(self, num: int, seed: int = 1) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        for name, sizes in self.cond.items():
            if name == "mask":  # of various lengths
                lengths = 2 + torch.arange(num) % (LENGTH - 1)
                found[name] = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
            elif name == "label":
                found[name] = torch.arange(num) % sizes[0]
            elif name in ("time_ids", "size"):
                found[name] = torch.tensor([[64.0, 48, 0, 0, 64, 48][: sizes[0]]]).expand(num, -1)
            else:
                found[name] = torch.randn(num, *sizes, generator=source)
        return found


def write_families(folder: Path) -> None:
    """Under `folder`: families/NAME, pipelines without encoders, except Stable Diffusion's; latents/NAME for each;
    prompts.txt; and captioned, two images."""
    from tiny_pipelines import written

    for name, tiny in TINY.items():
        place = folder / "families" / name
        if name == "sd15":
            written(name, place)
        else:
            tiny.model().save_pretrained(place / tiny.build.part)
            (place / "scheduler").mkdir()
            (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(tiny.scheduler_config)))
            (place / "model_index.json").write_text("{}")
        write(folder / "latents" / name, torch.zeros(2, *tiny.shape), tiny.conditions(2), tiny.conditions(1), "nowhere")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "captioned").mkdir()
    for i, caption in enumerate(("a red circle", "a blue square")):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / "captioned" / f"{i}.png")
        (folder / "captioned" / f"{i}.txt").write_text(caption)


def _flow(**keywords: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**keywords)


TEXT = {"text": (LENGTH, 16)}
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 8,
}  # fmt: skip
TINY: dict[str, Tiny] = {
    "sd15": Tiny(StableDiffusion, UNET, diffusers.DDIMScheduler(**VP), (4, 8, 8), TEXT),
    "sd21": Tiny(StableDiffusion, {**UNET, "use_linear_projection": True},
                 diffusers.DDIMScheduler(**VP, prediction_type="v_prediction"), (4, 8, 8), TEXT),
    "sdxl": Tiny(
        StableDiffusion,
        {**UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
         "projection_class_embeddings_input_dim": 6 * 8 + 12},
        diffusers.DDIMScheduler(**VP), (4, 8, 8), {**TEXT, "pooled": (12,), "time_ids": (6,)},
    ),
    "pixart": Tiny(
        PixArt,
        {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "caption_channels": 16, "cross_attention_dim": 16, "in_channels": 4, "out_channels": 8},
        diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, set_alpha_to_one=False, timestep_spacing="trailing",
                                clip_sample=False),
        (4, 8, 8), {**TEXT, "mask": (LENGTH,)},
    ),
    "sd3": Tiny(
        SD3,
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
         "pooled_projection_dim": 12, "out_channels": 4},
        _flow(shift=3.0), (4, 8, 8), {**TEXT, "pooled": (12,)},
    ),
    "flux": Tiny(
        Flux,
        {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16,
         "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        _flow(use_dynamic_shifting=True), (4, 8, 8), {**TEXT, "pooled": (16,)},
    ),
    "qwen_image": Tiny(
        QwenImage,
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
        _flow(use_dynamic_shifting=True), (4, 8, 8), {**TEXT, "mask": (LENGTH,)},
    ),
    "sana": Tiny(
        Sana,
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
         "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
         "cross_attention_dim": 8, "caption_channels": 16, "sample_size": 8},
        _flow(shift=3.0), (4, 8, 8), {**TEXT, "mask": (LENGTH,)},
    ),
    "dit": Tiny(
        DiT,
        {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10},
        diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, set_alpha_to_one=False, timestep_spacing="trailing",
                                clip_sample=False),
        (4, 8, 8), {"label": (10,)},
    ),
    "wan": Tiny(
        WanVideo,
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
         "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2},
        _flow(shift=5.0), (4, 3, 8, 8), TEXT,
    ),
    "cogvideox": Tiny(
        CogVideoX,
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
         "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 8,
         "sample_frames": 9, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": LENGTH,
         "use_rotary_positional_embeddings": True},
        diffusers.CogVideoXDDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                         prediction_type="v_prediction", rescale_betas_zero_snr=True,
                                         snr_shift_scale=1.0, timestep_spacing="trailing", set_alpha_to_one=False,
                                         clip_sample=False),
        (4, 3, 8, 8), TEXT,
    ),
    "ltx_video": Tiny(
        LTXVideo,
        {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16},
        _flow(use_dynamic_shifting=True, base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95,
              max_shift=2.05),
        (8, 2, 4, 4), {**TEXT, "mask": (LENGTH,)}, {"rate": 25.0, "in_time": 8, "in_space": 32},
    ),
    "hunyuan_video": Tiny(
        HunyuanVideo,
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16,
         "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4), "guidance_embeds": True},
        _flow(shift=7.0), (4, 3, 4, 4), {**TEXT, "mask": (LENGTH,), "pooled": (8,)},
    ),
    "stable_audio": Tiny(
        StableAudio,
        {"sample_size": 4, "in_channels": 3, "num_layers": 2, "attention_head_dim": 4,
         "num_key_value_attention_heads": 2, "out_channels": 3, "num_attention_heads": 2, "cross_attention_dim": 4,
         "time_proj_dim": 8, "global_states_input_dim": 8, "cross_attention_input_dim": 16},
        {"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0,
         "prediction_type": "v_prediction"},  # the class needs torchsde
        (3, 8), {**TEXT, "pooled": (1, 8)},
    ),
}  # fmt: skip
