"""Time embeddings without fast columns, so that consistency tangents stay of the size of the network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.shards import mapped


class TamedLinear(nn.Linear):
    """A linear whose masked input columns are held at zero; its state dict is a plain linear's with zeros there."""

    keep: Tensor

    def __init__(self, linear: nn.Linear, keep: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.register_buffer("keep", keep.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.keep, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[prefix + "weight"] = mapped(destination[prefix + "weight"], lambda rows: rows * self.keep)


def tame_time(unet: Any, fastest: float) -> None:
    """Hold at zero the columns of a diffusers UNet's `time_embedding.linear_1` whose frequency exceeds `fastest`.

    At 1/250 with a network fed 250 ln(sigma), nothing varies faster than ln(sigma) itself. Without it the time part of
    a consistency tangent dwarfs its state part near t_max.
    """
    half = unet.time_proj.num_channels // 2
    power = torch.arange(half) / (half - unet.time_proj.downscale_freq_shift)
    slow = torch.exp(-math.log(10_000.0) * power) <= fastest
    unet.time_embedding.linear_1 = TamedLinear(unet.time_embedding.linear_1, torch.cat([slow, slow]))
