"""All blocks on: dense attention by this package's kernels, the baseline that sparse masks are timed against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.ordering import Grid


@dataclass(frozen=True)
class Full(Mask):
    """Every block of the sequence, in the model's own order."""

    def layout(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLayout:
        return _all(q.shape[2], k.shape[2], q.device)


@cache
def _all(q_len: int, kv_len: int, device: torch.device) -> BlockLayout:
    return BlockLayout.full(q_len, kv_len, device=device)
