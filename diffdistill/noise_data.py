"""Normal numbers in the place of samples and of whatever a network is told: to measure time, not to learn."""

from __future__ import annotations

import copy
from typing import Any

import torch

from diffdistill.data import PROCEDURAL, uniform_classes
from diffdistill.denoiser import Cond
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError, require_at_least
from diffdistill.evaluation.reference import Reference
from diffdistill.rng import Rng


class Noise:
    """shape: of a sample.  num_classes: 0 is none.  tokens: of a text, for networks that read one."""

    name = "noise"
    provides = frozenset({"x0"})
    source = PROCEDURAL

    def __init__(self, shape: tuple[int, ...], num_classes: int = 0, tokens: int = 16) -> None:
        require_at_least(1, tokens=tokens)
        require_at_least(0, num_classes=num_classes)
        if not shape or min(shape) < 1:
            raise UserError("shape", "must be sizes >= 1", list(shape), "[4,16,16] is a small latent.")
        self.shape, self.num_classes, self.tokens = shape, num_classes, tokens
        self.sizes: dict[str, tuple[int, ...]] = {}  # of conditions beside the class

    def told(self, network: Any, pipeline: str | None) -> Noise:
        """The same with the conditions that `network` asks for. Raises UserError where it reads channels beside."""
        if getattr(network, "reads_more", False):
            raise UserError("data", "must give the condition concat", self.name, "Choose a network that reads none.")
        found = copy.copy(self)
        asked = network.asked() if hasattr(network, "asked") else {}
        found.sizes = {
            name: (self.tokens, *size[1:]) if name in ("text", "mask") else size
            for name, size in asked.items()
            if name != "label"
        }
        return found

    @property
    def null(self) -> Cond | None:
        """Of networks that read a text; a class has a row of its own for it."""
        return self._numbers(Rng(20240717, 0, "null", range(1))) if "text" in self.sizes else None

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        shape = (len(rng), *self.shape)
        return Batch(self.conditions(rng), shape, rng.normal(shape, dtype) if "x0" in needs else None)

    def conditions(self, rng: Rng) -> Cond:
        return {**uniform_classes(rng, self.num_classes), **self._numbers(rng)}

    def reference(self) -> Reference:
        """1,000 draws with a seed of their own."""
        rng = Rng(20240717, 0, "reference", range(1000))
        return Reference(self.name, rng.normal((len(rng), *self.shape)), self.conditions(rng).get("label"))

    def features(self) -> None:
        return None

    def _numbers(self, rng: Rng) -> Cond:
        return {
            name: torch.ones(len(rng), *size, dtype=torch.int64, device=rng.device)
            if name == "mask"
            else rng.normal((len(rng), *size))
            for name, size in self.sizes.items()
        }
