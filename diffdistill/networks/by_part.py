"""Attention in a network call that several roles share, each by its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.networks.call import Call, enter


@dataclass(frozen=True)
class ByPart:
    """attentions: one for each part of `call`, which attends to the rows of its samples."""

    call: Call
    attentions: tuple[Any, ...]
    cross: bool = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layout: BlockLayout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        found = []
        for (part, rows), attention in zip(self.call.rows(len(q)), self.attentions, strict=True):
            own = mask if mask is None or len(mask) == 1 else mask[rows]
            with enter(part):
                found.append(attention(q[rows], k[rows], v[rows], scale=scale, layout=layout, mask=own))
        return torch.cat(found)

    def ready(self) -> None:
        pass

    def explain(self) -> str:
        return "; ".join(
            f"{part.role} by {one.explain()}" for part, one in zip(self.call.parts, self.attentions, strict=True)
        )
