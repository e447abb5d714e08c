"""Text to video: Wan 2.1, CogVideoX, LTX-Video and HunyuanVideo, clips [B, C, T, H, W] of latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.errors import require_at_least, require_positive
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.stock import ReadsScale, Stock, as_called
from diffdistill.networks.scheduled import Schedule


class WanVideo(Stock):
    """text. Wan team 2025, arXiv:2503.20314. Image to video: concat, the mask and the latents of the first frame."""

    model_class = "WanTransformer3DModel"
    dims = 4
    embedding = "condition_embedder.time_embedder"
    grid = ""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    @property
    def channels(self) -> int:
        return int(self.model.config.out_channels)  # image to video reads more

    def tokens(self, shape: tuple[int, ...]) -> int:
        return _patches(shape, self.model.config.patch_size)

    def asked(self) -> dict[str, tuple[int, ...]]:
        return {"text": (512, int(self.model.config.text_dim))}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        return self.model(self.with_more(x, cond), t_net, self.given(cond, "text").to(x.dtype), return_dict=False)[0]


class CogVideoX(Stock):
    """text. Yang et al. 2024, arXiv:2408.06072."""

    model_class = "CogVideoXTransformer3DModel"
    dims = 4
    embedding = "time_embedding"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    @property
    def channels(self) -> int:
        return int(self.model.config.out_channels)

    def tokens(self, shape: tuple[int, ...]) -> int:
        p = self.model.config.patch_size
        return _patches(shape, (self.model.config.patch_size_t or 1, p, p))

    def asked(self) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        return {"text": (int(config.max_text_seq_length), int(config.text_embed_dim))}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        out = self.model(
            self.with_more(x, cond).transpose(1, 2),
            self.given(cond, "text").to(x.dtype),
            t_net,
            image_rotary_emb=self._rotary(x) if self.model.config.use_rotary_positional_embeddings else None,
            return_dict=False,
        )[0]
        return out.transpose(1, 2)

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the pipeline makes it for clips of the model's own grid."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self.model.config
        frames, (rows, columns) = x.shape[2], (size // config.patch_size for size in x.shape[3:])
        own = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        if config.patch_size_t is None:
            crops = get_resize_crop_region_for_grid((rows, columns), own[1], own[0])
            places: dict[str, Any] = {"temporal_size": frames}
        else:
            crops = ((0, 0), own)  # CogVideoX 1.5 slices a grid of its own size
            places = {"temporal_size": -(-frames // config.patch_size_t), "grid_type": "slice", "max_size": own}
        return get_3d_rotary_pos_embed(config.attention_head_dim, crops, (rows, columns), device=x.device, **places)


class LTXVideo(Stock):
    """text with its mask. HaCohen et al. 2024, arXiv:2501.00103. rate: frames per second of what it draws."""

    model_class = "LTXVideoTransformer3DModel"
    dims = 4
    needs = ("text", "mask")
    embedding = "time_embed.emb.timestep_embedder"

    def __init__(self, model: Any, schedule: Schedule, rate: float, in_time: int, in_space: int) -> None:
        super().__init__(model, schedule)
        require_positive(rate=rate)
        require_at_least(1, in_time=in_time, in_space=in_space)
        self.spread = (in_time / rate, in_space, in_space)  # of a latent, in seconds and pixels

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[1] * shape[2] * shape[3]

    def asked(self) -> dict[str, tuple[int, ...]]:
        return {"text": (128, int(self.model.config.caption_channels)), "mask": (128,)}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        frames, height, width = x.shape[2:]
        tokens = self.model(
            x.flatten(2).transpose(1, 2),
            encoder_hidden_states=self.given(cond, "text").to(x.dtype),
            timestep=t_net,
            encoder_attention_mask=self.given(cond, "mask"),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self.spread,
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (frames, height, width))


class HunyuanVideo(ReadsScale):
    """text with its mask, and pooled; fed the scale it imitates, as Flux is. Kong et al. 2024, arXiv:2412.03603."""

    model_class = "HunyuanVideoTransformer3DModel"
    dims = 4
    needs = ("text", "mask", "pooled")
    embedding = "time_text_embed.timestep_embedder"
    grid = "sigmas"

    def words(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, pooled, mask = pipeline.encode_prompt(texts, device=pipeline.device, **as_called(pipeline))
        return {"text": text, "pooled": pooled, "mask": mask}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def unguided(self) -> dict[str, Any]:
        return {"guidance_scale": self.guidance}  # fed to the model

    def tokens(self, shape: tuple[int, ...]) -> int:
        p = self.model.config.patch_size
        return _patches(shape, (self.model.config.patch_size_t, p, p))

    def asked(self) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        text: dict[str, tuple[int, ...]] = {"text": (256, int(config.text_embed_dim)), "mask": (256,)}
        return {**text, "pooled": (int(config.pooled_projection_dim),)}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = 1000 * self.fed_scale(t_net, cond)
        return self.model(
            x,
            timestep=t_net,
            encoder_hidden_states=self.given(cond, "text").to(x.dtype),
            encoder_attention_mask=self.given(cond, "mask"),
            pooled_projections=self.given(cond, "pooled").to(x.dtype),
            guidance=guidance,
            return_dict=False,
        )[0]


def _patches(shape: tuple[int, ...], patch: Sequence[int]) -> int:
    frames, height, width = (size // p for size, p in zip(shape[1:], patch, strict=True))
    return frames * height * width


def wan_video(path: str) -> WanVideo:
    """From a pipeline folder or hub id."""
    return WanVideo(*load(path, WanVideo))


def cogvideox(path: str) -> CogVideoX:
    """From a pipeline folder or hub id."""
    return CogVideoX(*load(path, CogVideoX))


def ltx_video(path: str, rate: float = 25.0, in_time: int = 8, in_space: int = 32) -> LTXVideo:
    """From a pipeline folder or hub id. rate: frames per second.  in_time, in_space: what its VAE divides by."""
    model, schedule = load(path, LTXVideo)
    return LTXVideo(model, schedule, rate, in_time, in_space)


def hunyuan_video(path: str, guidance: float = 6.0) -> HunyuanVideo:
    """From a pipeline folder or hub id. guidance: the scale it is fed."""
    model, schedule = load(path, HunyuanVideo)
    return HunyuanVideo(model, schedule, guidance)
