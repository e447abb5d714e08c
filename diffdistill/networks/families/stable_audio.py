"""StableAudioDiTModel: latents [C, length] of sound. Evans et al. 2024, arXiv:2407.14358."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.stock import Stock


class StableAudio(Stock):
    """text [B, L, D], with the embedded start and end, and pooled [B, 1, P]: those two alone."""

    model_class = "StableAudioDiTModel"
    dims = 2
    needs = ("text", "pooled")
    embedding = "timestep_proj"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[1]

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


def stable_audio(path: str) -> StableAudio:
    """From a pipeline folder or hub id."""
    return StableAudio(*load(path, StableAudio))
