"""A small residual MLP for 2-D data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.errors import UserError, require_at_least
from diffdistill.networks.exact import check_points
from diffdistill.networks.files import resolve, seeded
from diffdistill.networks.inputs import sinusoid
from diffdistill.process import EDM, F

MAX_DEPTH = 1000


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
    """Raw output F under the EDM process for points [B, dim], optionally by class; the last class row is null.

    sigma_data: standard deviation of the data.  sigma_min, sigma_max: range of noise levels.  num_classes: without
    the null row, 0 is unconditional.
    """

    closed_form = False
    embedding_name = "time_embedding"

    def __init__(
        self,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
        dim: int,
        width: int,
        depth: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim)
        require_at_least(0, num_classes=num_classes)
        if width < 2 or width % 2:
            raise UserError("width", "must be even and >= 2", width, "Half of the time features are sines.")
        if not 1 <= depth <= MAX_DEPTH:
            raise UserError("depth", f"must lie in 1..{MAX_DEPTH}", depth, "3 is a good number.")
        self.config: dict[str, Any] = {
            "sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max,
            "dim": dim, "width": width, "depth": depth, "num_classes": num_classes,
        }  # fmt: skip
        self.process, self.kind = EDM.between(sigma_min, sigma_max), F(sigma_data)
        self.sigma_data = sigma_data
        self.embedding_width = width
        self.inlet = nn.Linear(dim, width)
        self.time_embedding = TimeEmbedding(width)
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.null: Cond | None = {"label": torch.tensor([num_classes])} if num_classes else None

    @property
    def backbone(self) -> Mlp:
        """The module by whose names adapters find their places."""
        return self

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def check(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Raise UserError unless it denoises samples of `shape` with labels 0 to num_classes - 1."""
        check_points(self.config["dim"], self.config["num_classes"], shape, num_classes)

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

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors")


def mlp_from_config(
    sigma_data: float, sigma_min: float, sigma_max: float, dim: int, width: int, depth: int, num_classes: int, seed: int
) -> Mlp:
    """An Mlp with random weights."""
    with seeded(seed):
        return Mlp(sigma_data, sigma_min, sigma_max, dim, width, depth, num_classes)


def mlp(path: str) -> Mlp:
    """A trained Mlp. path: a folder that `save` wrote, or `asset:<name>` for a shipped one."""
    folder = Path(resolve(path))
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise UserError("path", "must hold config.json and model.safetensors", repr(path), "Name such a folder.")
    try:
        network = Mlp(**json.loads((folder / "config.json").read_text()))
        if torch.get_default_device().type != "meta":
            network.load_state_dict(load_file(folder / "model.safetensors"))
    except (ValueError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        raise UserError("path", "must hold the two files that saving wrote", repr(path), f"{error}.") from error
    return network
