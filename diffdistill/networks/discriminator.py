"""Discriminator heads on recorded features, and scalar roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffdistill.networks.call import Ask, asked
from diffdistill.networks.inputs import sinusoid


class Heads(nn.Module):
    """One small head per recorded layer; the logit of a sample is the mean over the heads.

    features: dict from layer to [B, C, *space] or [B, C]. Maps go through convolution, GroupNorm and SiLU to a
    logit map whose mean counts; vectors through a small MLP. As DMD2 (arXiv:2405.14867) on the bottleneck.
    """

    role = "discriminator"

    def __init__(self, shapes: Mapping[int, Sequence[int]], hidden: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({str(layer): _head(tuple(shape), hidden) for layer, shape in shapes.items()})

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks to record."""
        return tuple(int(name) for name in self.heads)

    def forward(self, features: Mapping[int, Tensor]) -> Tensor:
        """Logits [B]; real is positive."""
        return asked(Ask(self.role, self._logits, (features,), next(iter(features.values()))))

    def _logits(self, features: Mapping[int, Tensor]) -> Tensor:
        logits = [head(features[int(name)].float()).flatten(1).mean(1) for name, head in self.heads.items()]
        return torch.stack(logits).mean(0)


def _head(shape: tuple[int, ...], hidden: int) -> nn.Module:
    channels = shape[0]
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, 1))
    conv = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    return nn.Sequential(conv(channels, hidden, 1), nn.GroupNorm(8, hidden), nn.SiLU(), conv(hidden, 1, 1))


class Scalar(nn.Module):
    """A learned function of time, zero at first: adaptive log-weights (EDM2 arXiv:2312.02696, sCM arXiv:2410.11081).

    forward: what the time embedding is fed, t_net [B] -> [B].
    """

    role = "weight"

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, t_net: Tensor) -> Tensor:
        return asked(Ask(self.role, self._value, (t_net,), t_net))

    def _value(self, t_net: Tensor) -> Tensor:
        features = sinusoid(t_net.to(self.first.weight.dtype), self.width)
        return self.last(nn.functional.silu(self.first(features))).sum(1)  # of one; a view would trouble FSDP2
