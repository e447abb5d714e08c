"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5. Esser et al. 2024, arXiv:2403.03206."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.stock import TwoStreams, as_called


class SD3(TwoStreams):
    """text of three encoders, joined as the pipeline joins them, and pooled."""

    model_class = "SD3Transformer2DModel"
    needs = ("text", "pooled")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def words(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, device=pipeline.device, do_classifier_free_guidance=False, **as_called(pipeline)
        )
        return {"text": text, "pooled": pooled}

    def asked(self) -> dict[str, tuple[int, ...]]:
        config = self.model.config  # 77 tokens of CLIP and 256 of T5
        return {"text": (77 + 256, int(config.joint_attention_dim)), "pooled": (int(config.pooled_projection_dim),)}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        return self.model(
            x,
            encoder_hidden_states=self.given(cond, "text").to(x.dtype),
            pooled_projections=self.given(cond, "pooled").to(x.dtype),
            timestep=t_net,
            return_dict=False,
        )[0]


def sd3(path: str) -> SD3:
    """From a pipeline folder or hub id."""
    return SD3(*load(path, SD3))
