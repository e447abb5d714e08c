"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x and XL, their inpainting forms, and what was fine-tuned from them.

Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config_errors import first_line
from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.networks.diffusers import model_keywords
from diffdistill.networks.families.folder import load, load_schedule
from diffdistill.networks.families.stock import ReadsScale
from diffdistill.networks.files import seeded


class StableDiffusion(ReadsScale):
    """XL also takes pooled [B, 1280] and time_ids [B, 6]: original height and width, crop top and left, target size.

    A model with time_cond_proj_dim (LCM) is fed the scale it imitates: cond["w"], or `guidance`.
    """

    part = "unet"
    model_class = "UNet2DConditionModel"
    embedding = "time_embedding"
    grid = "timesteps"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]

    @property
    def channels(self) -> int:
        return int(self.model.config.out_channels)  # inpainting reads more

    def words(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        found = pipeline.encode_prompt(
            texts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": found[0]} if len(found) == 2 else {"text": found[0], "pooled": found[2]}

    def no_words(self, pipeline: Any, negative: str | None) -> dict[str, Tensor]:
        found = super().no_words(pipeline, negative)
        if negative is None and pipeline.config.get("force_zeros_for_empty_prompt"):  # XL was trained so
            return {key: value.zero_() for key, value in found.items()}
        return found

    def sized(self, height: int, width: int) -> dict[str, Tensor]:
        if self.model.config.addition_embed_type != "text_time":
            return {}
        return {"time_ids": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)}

    def asked(self) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        sizes: dict[str, tuple[int, ...]] = {"text": (77, int(config.cross_attention_dim))}
        if config.addition_embed_type != "text_time":
            return sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**sizes, "pooled": (pooled,), "time_ids": (6,)}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        config = self.model.config
        inputs: dict[str, Any] = {"encoder_hidden_states": self.given(cond, "text").to(x.dtype)}
        if config.addition_embed_type == "text_time":
            pooled, ids = self.given(cond, "pooled"), self.given(cond, "time_ids")
            inputs["added_cond_kwargs"] = {"text_embeds": pooled.to(x.dtype), "time_ids": ids.to(x.dtype)}
        if config.time_cond_proj_dim is not None:
            # LCM's own w is 0 for the plain conditional model; this package's is 1
            w = self.fed_scale(t_net, cond)
            inputs["timestep_cond"] = _scale_embedding(w - 1, config.time_cond_proj_dim).to(x.dtype)
        return self.model(self.with_more(x, cond), t_net, return_dict=False, **inputs)[0]


def _scale_embedding(w: Tensor, width: int) -> Tensor:
    """As LatentConsistencyModelPipeline embeds it: sines, then cosines, of 1000 w."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, device=w.device, dtype=w.dtype) * -(torch.log(w.new_tensor(1e4)) / (half - 1))
    )
    angle = 1000 * w[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], 1)


def stable_diffusion_from_config(path: str, config: Mapping[str, Any], seed: int) -> StableDiffusion:
    """With random weights. path: of the pipeline around it.  config: of diffusers' UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    keywords = model_keywords(config, UNet2DConditionModel, _COUNTS)
    with seeded(seed):
        try:
            model = UNet2DConditionModel(**keywords)
        except Exception as error:  # diffusers leaves most of its keywords unchecked
            fix = first_line(error) or repr(error)
            raise UserError("config", "must build a diffusers UNet2DConditionModel", keywords, fix) from error
    return StableDiffusion(model, load_schedule(path), 1.0)


# sizes of which none makes no network
_COUNTS = {
    "sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
    "cross_attention_dim", "attention_head_dim",
}  # fmt: skip


def stable_diffusion(path: str, guidance: float = 1.0) -> StableDiffusion:
    """From a pipeline folder or hub id. guidance: the scale a model with a scale input (LCM) is fed."""
    model, schedule = load(path, StableDiffusion)
    return StableDiffusion(model, schedule, guidance)
