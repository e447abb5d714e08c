"""DiTTransformer2DModel: class-conditional latents of ImageNet. Peebles & Xie 2022, arXiv:2212.09748."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.networks.families.folder import load
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.scheduled import Schedule


class DiT(Stock):
    """label [B]; the null condition is the row behind the classes, kept for dropped labels.

    Every block embeds time for itself, so a student of it takes no extra inputs.
    """

    model_class = "DiTTransformer2DModel"
    needs = ("label",)
    embedding = None

    def __init__(self, model: Any, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.num_classes = int(model.config.num_embeds_ada_norm)
        self.null = {"label": torch.tensor([self.num_classes])}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def check(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().check(shape, num_classes)
        if num_classes > self.num_classes:
            constraint = f"must have a row for each of the data's {num_classes} classes"
            raise UserError("networks", constraint, f"{self.num_classes} rows", "Choose the data it was made for.")

    def asked(self) -> dict[str, tuple[int, ...]]:
        return {"label": ()}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        out = self.model(x, timestep=t_net, class_labels=self.given(cond, "label"), return_dict=False)[0]
        return out[:, : x.shape[1]]  # the rest is a learned variance


def dit(path: str) -> DiT:
    """From a pipeline folder or hub id."""
    return DiT(*load(path, DiT))
