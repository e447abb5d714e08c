"""A small residual MLP for 2-D data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.networks.inputs import sinusoid
from diffdistill.process import Kind, NoiseProcess


class Block(nn.Module):
    """h + linear(SiLU(linear(norm(h)) + embedding))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.embed = nn.Linear(width, width)
        self.last = nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        inner = self.first(self.norm(hidden)) + self.embed(embedding)
        return hidden + self.last(nn.functional.silu(inner))


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, width)
        self.last = nn.Linear(width, width)

    def forward(self, t_net: Tensor) -> Tensor:
        # t_net is of order 1 (log noise level / 4): frequencies up to 4
        features = sinusoid(4 * t_net.to(self.first.weight.dtype), self.width, max_period=64.0)
        return self.last(nn.functional.silu(self.first(features)))


class Mlp(nn.Module):
    """Raw prediction for points [B, dim], optionally by class; the last class row is the null condition.

    kind: what is predicted (F with the data's std is EDM's preconditioning).  num_classes: without the null row.
    """

    closed_form = False
    embedding_name = "time_embedding"

    def __init__(
        self,
        process: NoiseProcess,
        kind: Kind,
        sigma_data: float,
        dim: int = 2,
        width: int = 96,
        depth: int = 4,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.process, self.kind, self.sigma_data, self.dim = process, kind, sigma_data, dim
        self.embedding_width = width
        self.inlet = nn.Linear(dim, width)
        self.time_embedding = TimeEmbedding(width)
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.null: Cond | None = {"label": torch.tensor([num_classes])} if num_classes else None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def scale(self, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha_sigma(t)
        return torch.rsqrt((alpha * self.sigma_data).square() + sigma.square())

    def time(self, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha_sigma(t)
        return torch.log(sigma / alpha) / 4

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        embedding = self.time_embedding(t_net)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(cond["label"])
        hidden = self.inlet(x)
        for layer in self.layers:
            hidden = layer(hidden, embedding)
        return self.outlet(hidden)
