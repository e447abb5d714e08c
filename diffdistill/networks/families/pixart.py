"""PixArtTransformer2DModel: PixArt-alpha and -Sigma. Chen et al. 2023, arXiv:2310.00426; 2024, arXiv:2403.04692."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.errors import UserError, require_positive
from diffdistill.networks.diffusers import model_keywords
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.files import seeded
from diffdistill.networks.scheduled import Schedule
from diffdistill.process import EDM, F


class PixArt(Stock):
    """text with its mask. Alpha at 1024 pixels also takes size [B, 2], height and width in pixels."""

    model_class = "PixArtTransformer2DModel"
    needs = ("text", "mask")
    embedding = "adaln_single.emb.timestep_embedder"
    grid = "timesteps"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def sized(self, height: int, width: int) -> dict[str, Tensor]:
        return {"size": torch.tensor([[height, width]]).float()} if self.model.use_additional_conditions else {}

    def unguided(self) -> dict[str, Any]:
        return {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}

    def asked(self) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, tuple[int, ...]] = {"text": (300, int(self.model.config.caption_channels)), "mask": (300,)}
        return {**sizes, "size": (2,)} if self.model.use_additional_conditions else sizes

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            size = self.given(cond, "size").to(x.dtype)
            added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        out = self.model(
            x,
            encoder_hidden_states=self.given(cond, "text").to(x.dtype),
            encoder_attention_mask=self.given(cond, "mask"),
            timestep=t_net,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]  # the rest is a learned variance


def pixart(path: str) -> PixArt:
    """From a pipeline folder or hub id."""
    return PixArt(*load(path, PixArt))


_COUNTS = {
    "sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads",
    "attention_head_dim", "cross_attention_dim", "caption_channels",
}  # fmt: skip


def pixart_from_config(
    config: Mapping[str, Any], sigma_data: float, sigma_min: float, sigma_max: float, seed: int
) -> PixArt:
    """With random weights, under the EDM process. config: keywords of diffusers' PixArtTransformer2DModel."""
    from diffusers import PixArtTransformer2DModel

    keywords = model_keywords(config, PixArtTransformer2DModel, _COUNTS)
    require_positive(sigma_data=sigma_data)
    with seeded(seed):
        try:
            model = PixArtTransformer2DModel(**keywords)
        except Exception as error:  # diffusers leaves most of its keywords unchecked
            fix = "Mend its keys."
            raise UserError("config", "must build a diffusers PixArtTransformer2DModel", repr(error), fix) from error
    return PixArt(model, Schedule(EDM.between(sigma_min, sigma_max), F(sigma_data), None))
