"""Data that has a teacher's shapes and no content, for plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.data import Source
from diffdistill.distillers.base import Batch, Pair, Trajectory
from diffdistill.evaluation.features import Classifier
from diffdistill.evaluation.reference import Reference
from diffdistill.networks.families.stock import Stock
from diffdistill.process import wide
from diffdistill.rng import Rng

COUNTS = ("mask", "label")  # conditions that are whole numbers


@dataclass(frozen=True, eq=False)
class StandIn:
    """Zeros in the place of samples, ones in the place of conditions. sizes: of one sample's conditions."""

    shape: tuple[int, ...]
    sizes: Mapping[str, tuple[int, ...]]
    num_classes: int = 0
    provides: frozenset[str] = frozenset({"x0"})
    name: str = field(default="stand-in", init=False)
    source: Source = field(default=Source("nothing", "none"), init=False)

    @property
    def null(self) -> dict[str, Tensor] | None:
        """Of models told in words; a class has a row of its own for it."""
        return None if "label" in self.sizes else self._conditions(1, "cpu")

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        shape = (len(rng), *self.shape)
        x0 = torch.zeros(shape, dtype=dtype, device=rng.device) if "x0" in needs else None
        return Batch(self.conditions(rng), shape, x0)

    def conditions(self, rng: Rng) -> dict[str, Tensor]:
        return self._conditions(len(rng), rng.device)

    def _conditions(self, num: int, device: torch.device | str) -> dict[str, Tensor]:
        return {
            name: torch.ones(num, *sizes, dtype=torch.int64 if name in COUNTS else torch.float32, device=device)
            for name, sizes in self.sizes.items()
        }

    def reference(self) -> Reference:
        raise NotImplementedError("a plan evaluates nothing")

    def features(self) -> Classifier | None:
        return None


def stand_in(network: Stock, size: tuple[int, int] | None, frames: int, factors: tuple[int, int]) -> StandIn:
    """What `network` is trained on, as `Prompts` and `latents` of that size would give it. factors: of its VAE."""
    shape, _ = network.latents(size, frames, *factors)
    sizes = dict(network.asked())
    if network.reads_more:
        sizes["concat"] = (int(network.model.config.in_channels) - network.channels, *shape[1:])
    return StandIn(shape, sizes, network.num_classes)


class Made:
    """Data whose batches also hold what a teacher would have made: pairs, or states of its trajectories."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        """As the data's, which are drawn on the CPU, with those that are needed."""
        if rng.device.type == "cpu" and not needs & {"pair", "trajectory"}:
            return self.data.batch(rng, global_batch, needs, dtype)
        drawn = self.data.batch(rng.on("cpu"), global_batch, needs, dtype)
        cond = {name: value.to(rng.device) for name, value in drawn.cond.items()}
        batch = replace(drawn, cond=cond, x0=None if drawn.x0 is None else drawn.x0.to(rng.device))
        x = torch.zeros(batch.shape, dtype=dtype, device=rng.device)
        t = torch.ones(len(rng), dtype=wide(dtype), device=rng.device)
        pair = Pair(x, torch.zeros_like(x), batch.cond) if "pair" in needs else None
        trajectory = Trajectory(x, t, torch.zeros_like(x), t, batch.cond) if "trajectory" in needs else None
        return replace(batch, pair=pair, trajectory=trajectory)
