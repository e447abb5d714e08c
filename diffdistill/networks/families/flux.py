"""FluxTransformer2DModel: FLUX.1 dev (which reads a guidance scale) and schnell. Black Forest Labs 2024."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.packing import Packed, pack, unpack
from diffdistill.networks.families.stock import ReadsScale, as_called


class Flux(Packed, ReadsScale):
    """text and pooled. A model with guidance_embeds is fed the scale it imitates: cond["w"], or `guidance`."""

    model_class = "FluxTransformer2DModel"
    needs = ("text", "pooled")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def unguided(self) -> dict[str, Any]:
        return {"guidance_scale": self.guidance}  # fed to the model

    def words(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = pipeline.encode_prompt(texts, device=pipeline.device, **as_called(pipeline))
        return {"text": text, "pooled": pooled}

    def asked(self) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        return {"text": (512, int(config.joint_attention_dim)), "pooled": (int(config.pooled_projection_dim),)}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        text = self.given(cond, "text").to(x.dtype)
        height, width = x.shape[-2:]
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = self.fed_scale(t_net, cond)
        tokens = self.model(
            pack(x),
            encoder_hidden_states=text,
            pooled_projections=self.given(cond, "pooled").to(x.dtype),
            timestep=t_net,
            img_ids=_places(height // 2, width // 2, x),
            txt_ids=x.new_zeros(text.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """(0, row, column) of each token, [rows * columns, 3]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], 2).view(-1, 3).to(like)


def flux(path: str, guidance: float = 3.5) -> Flux:
    """From a pipeline folder or hub id. guidance: the scale that a model with guidance_embeds is fed."""
    model, schedule = load(path, Flux)
    return Flux(model, schedule, guidance)
