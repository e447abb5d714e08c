"""QwenImageTransformer2DModel. Wu et al. 2025, Qwen-Image Technical Report, arXiv:2508.02324."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.packing import Packed, pack, unpack
from diffdistill.networks.families.stock import as_called


class QwenImage(Packed):
    """text with its mask."""

    model_class = "QwenImageTransformer2DModel"
    needs = ("text", "mask")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def unguided(self) -> dict[str, Any]:
        return {"true_cfg_scale": 1.0}

    def words(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, mask = pipeline.encode_prompt(texts, device=pipeline.device, **as_called(pipeline))
        return {"text": text, "mask": torch.ones(text.shape[:2], dtype=torch.int64) if mask is None else mask}

    def asked(self) -> dict[str, tuple[int, ...]]:
        return {"text": (512, int(self.model.config.joint_attention_dim)), "mask": (512,)}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.model(
            pack(x),
            encoder_hidden_states=self.given(cond, "text").to(x.dtype),
            encoder_hidden_states_mask=self.given(cond, "mask").bool(),
            timestep=t_net,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def qwen_image(path: str) -> QwenImage:
    """From a pipeline folder or hub id."""
    return QwenImage(*load(path, QwenImage))
