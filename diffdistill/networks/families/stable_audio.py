"""StableAudioDiTModel: latents [C, length] of sound. Evans et al. 2024, arXiv:2407.14358."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.errors import require_positive
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.scheduled import Schedule


class StableAudio(Stock):
    """text [B, L, D], with the embedded start and end, and pooled [B, 1, P]: those two alone."""

    model_class = "StableAudioDiTModel"
    dims = 2
    needs = ("text", "pooled")
    embedding = "timestep_proj"

    def __init__(self, model: Any, schedule: Schedule, seconds: float = 47.55) -> None:
        super().__init__(model, schedule)
        require_positive(seconds=seconds)
        self.seconds = seconds

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[1]

    def latents(
        self, size: tuple[int, int] | None, frames: int, in_space: int, in_time: int
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        return (self.channels, int(self.model.config.sample_size)), (0, 0)

    def words(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Sounds that fill the model's whole length."""
        device, B = pipeline.device, len(texts)
        text = pipeline.encode_prompt(texts, device, False)
        start, end = pipeline.encode_duration([0.0] * B, [self.seconds] * B, device, False, B)
        return {"text": torch.cat([text, start, end], 1), "pooled": torch.cat([start, end], 2)}

    def asked(self) -> dict[str, tuple[int, ...]]:
        config = self.model.config  # 128 tokens, the start and the end
        return {
            "text": (130, int(config.cross_attention_input_dim)),
            "pooled": (1, int(config.global_states_input_dim)),
        }

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        pooled = self.given(cond, "pooled").to(x.dtype)
        width, length = self.model.config.attention_head_dim // 2, x.shape[2] + pooled.shape[1]
        cos, sin = get_1d_rotary_pos_embed(width, length, use_real=True, repeat_interleave_real=False)
        return self.model(
            x,
            t_net,
            encoder_hidden_states=self.given(cond, "text").to(x.dtype),
            global_hidden_states=pooled,
            rotary_embedding=(cos.to(x.device), sin.to(x.device)),
            return_dict=False,
        )[0]


def stable_audio(path: str, seconds: float = 47.55) -> StableAudio:
    """From a pipeline folder or hub id. seconds: of sound in the model's whole length."""
    model, schedule = load(path, StableAudio)
    return StableAudio(model, schedule, seconds)
