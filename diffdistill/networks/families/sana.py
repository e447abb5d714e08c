"""SanaTransformer2DModel: Sana, SANA-Sprint. Xie et al. 2024, arXiv:2410.10629; Chen et al. 2025, arXiv:2503.09641."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.stock import Stock


class Sana(Stock):
    """text with its mask."""

    model_class = "SanaTransformer2DModel"
    needs = ("text", "mask")
    embedding = "time_embed.emb.timestep_embedder"
    grid = "sigmas"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def time(self, t: Tensor) -> Tensor:
        return self.model.config.timestep_scale * super().time(t)

    def unguided(self) -> dict[str, Any]:
        return {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}

    def asked(self) -> dict[str, tuple[int, ...]]:
        return {"text": (300, int(self.model.config.caption_channels)), "mask": (300,)}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        return self.model(
            x,
            encoder_hidden_states=self.given(cond, "text").to(x.dtype),
            encoder_attention_mask=self.given(cond, "mask"),
            timestep=t_net,
            return_dict=False,
        )[0]


def sana(path: str) -> Sana:
    """From a pipeline folder or hub id."""
    return Sana(*load(path, Sana))
