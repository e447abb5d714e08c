"""Data sets: the embedded digits and toy densities. Draws go through Rng: the process count does not matter."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.distillers.base import Batch
from diffdistill.errors import require_positive
from diffdistill.evaluation.features import Classifier, load_features
from diffdistill.evaluation.reference import Reference
from diffdistill.networks.exact import check_rows, circle
from diffdistill.rng import Rng

AT_ONCE = 2**16  # places of latents decoded at once: one of 256 x 256, 16 of 64 x 64


@dataclass(frozen=True)
class Source:
    """Where data comes from and under which licence, for model cards."""

    description: str
    licence: str


PROCEDURAL = Source("drawn by this package", "apache-2.0")
SCANS = Source(
    'scikit-learn\'s copy of the UCI "Optical Recognition of Handwritten Digits" scans (Alpaydin & Kaynak 1998)',
    "cc-by-4.0",
)


class Data(Protocol):
    """name: of the data set.  shape: [*sample].  provides: what a batch can hold, among x0, pair, trajectory.

    Data of text and of latents also have, where it applies: told(network, pipeline), the data set for that network and
    of_pipeline(), that for a whole pipeline; of_classes(labels), conditions of classes; codec, between its samples and
    what people see, or None.  Data that reads files at each batch says so by from_files = True: `trainer.read_ahead`.
    Its `batch` must bear to be called by several threads at once.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def provides(self) -> frozenset[str]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def source(self) -> Source: ...

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        """The micro-batch of samples rng.ids at step rng.step, on rng's device; global_batch: samples per step."""
        ...

    def conditions(self, rng: Rng) -> Cond:
        """Conditions to evaluate with, one per sample of rng: classes uniform."""
        ...

    def reference(self) -> Reference:
        """The fixed real data that samples are measured against."""
        ...

    def features(self) -> Classifier | None:
        """The feature network its figures are measured with, if it has one."""
        ...


class Untold(Protocol):
    """Data of text, of which a network's pipeline makes conditions."""

    def told(self, network: Any, pipeline: str | None) -> Data:
        """The data set for that network."""
        ...


def digit_scans() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 scans of hand-written digits (Alpaydin & Kaynak 1998), part of that package.

    Returns images [1797, 1, 8, 8] float32 in [-1, 1] (raw / 8 - 1) and labels [1797] int64 in 0..9.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32).div(8).sub(1).unsqueeze(1)
    return images, torch.from_numpy(raw.target).to(torch.int64)


def uniform_classes(rng: Rng, num_classes: int) -> Cond:
    """{"label": [B]} with uniform classes; no condition for data without classes."""
    return {"label": rng.integers(num_classes, (len(rng),))} if num_classes else {}


@dataclass(frozen=True)
class Digits:
    """The scans, in epochs: every sample once per epoch, in an order that depends on the seed and the epoch alone."""

    name: str = field(default="digits", init=False)
    shape: tuple[int, ...] = field(default=(1, 8, 8), init=False)
    num_classes: int = field(default=10, init=False)
    provides: frozenset[str] = field(default=frozenset({"x0"}), init=False)
    source: Source = field(default=SCANS, init=False)

    @cached_property
    def _scans(self) -> tuple[Tensor, Tensor]:
        return digit_scans()

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        shape = (len(rng), *self.shape)
        if "x0" not in needs:
            return Batch(uniform_classes(rng, self.num_classes), shape)
        images, labels = self._scans
        chosen = torch.from_numpy(epoch_indices(rng, global_batch, len(images)))
        return Batch({"label": labels[chosen].to(rng.device)}, shape, images[chosen].to(rng.device, dtype))

    def conditions(self, rng: Rng) -> Cond:
        return uniform_classes(rng, self.num_classes)

    def reference(self) -> Reference:
        return Reference(self.name, *self._scans)

    def features(self) -> Classifier:
        return load_features()


def of_classes(data: Data, labels: Tensor) -> Cond:
    """Conditions of classes [B]: what the data is told of them, or the labels themselves."""
    told = getattr(data, "of_classes", None)
    return {"label": labels} if told is None else told(labels)


@torch.no_grad()
def seen(data: Data, samples: Tensor) -> Tensor:
    """What people see of samples [B, *shape]: latents decoded where the data has a codec, else the samples."""
    codec = getattr(data, "codec", None)
    if codec is None:
        return samples
    at_once = max(1, AT_ONCE // math.prod(samples.shape[2:]))
    return torch.cat([codec.decode(block) for block in samples.split(at_once)])


def epoch_indices(rng: Rng, global_batch: int, size: int) -> np.ndarray:
    """Which of `size` items the samples of rng are: positions step * global_batch + id in one permutation per epoch."""
    position = rng.step * global_batch + rng.ids
    epochs, offsets = np.divmod(position, size)
    indices = np.empty_like(position)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = rng.permutation(size, f"epoch {epoch}")[offsets[here]]
    return indices


@dataclass(frozen=True)
class Mixture2D:
    """Equal isotropic Gaussians on a circle, the class is the mode. Draws are fresh at every step.

    num_modes: on the circle.  radius: of it.  std: of a mode.  unconditional: every condition is the null class, so
    that a student has to find the modes by itself; for teachers that have one.
    """

    num_modes: int = 8
    radius: float = 1.0
    std: float = 0.05
    unconditional: bool = False
    name: str = field(default="gmm2d", init=False)
    shape: tuple[int, ...] = field(default=(2,), init=False)
    provides: frozenset[str] = field(default=frozenset({"x0"}), init=False)
    source: Source = field(default=PROCEDURAL, init=False)

    def __post_init__(self) -> None:
        circle(self.num_modes, self.radius)
        require_positive(std=self.std)

    @property
    def num_classes(self) -> int:
        return self.num_modes

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        modes = uniform_classes(rng, self.num_modes)
        x0 = self._draw(rng, modes["label"], dtype) if "x0" in needs else None
        return Batch(self._told(modes), (len(rng), *self.shape), x0)

    def conditions(self, rng: Rng) -> Cond:
        return self._told(uniform_classes(rng, self.num_modes))

    def reference(self) -> Reference:
        """10,000 draws with a seed of their own."""
        rng = Rng(20240717, 0, "reference", range(10_000))
        labels = uniform_classes(rng, self.num_modes)["label"]
        return Reference(self.name, self._draw(rng, labels, torch.float32), labels, self)

    @property
    def centres(self) -> Tensor:
        """Of the modes, [num_modes, 2]."""
        return torch.tensor(circle(self.num_modes, self.radius), dtype=torch.float64)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x) in nats of points [n, 2], [n]."""
        distance = torch.cdist(x.double(), self.centres).square() / (2 * self.std**2)
        return torch.logsumexp(-distance, 1) - math.log(self.num_modes * 2 * math.pi * self.std**2)

    def features(self) -> None:
        return None

    def _told(self, modes: Cond) -> Cond:
        """What a network is told of the modes: all, or the null class alone."""
        return {"label": torch.full_like(modes["label"], self.num_modes)} if self.unconditional else modes

    def _draw(self, rng: Rng, labels: Tensor, dtype: torch.dtype) -> Tensor:
        centres = _circle(self.num_modes, self.radius, dtype, rng.device)
        return centres[labels] + self.std * rng.normal((len(rng), 2), dtype)


@functools.lru_cache(maxsize=8)  # every batch asks for the same one
def _circle(num_modes: int, radius: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num_modes, 2]; not to be written."""
    return torch.tensor(circle(num_modes, radius), dtype=dtype, device=device)


@dataclass(frozen=True)
class GaussianData:
    """N(mean, std^2) per coordinate, by class where there is more than one row. mean, std: [rows][dim]."""

    mean: Sequence[Sequence[float]] = ((0.7,),)
    std: Sequence[Sequence[float]] = ((1.3,),)
    name: str = field(default="gauss", init=False)
    provides: frozenset[str] = field(default=frozenset({"x0"}), init=False)
    source: Source = field(default=PROCEDURAL, init=False)

    def __post_init__(self) -> None:
        check_rows(self.mean, self.std)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.mean[0]),)

    @property
    def num_classes(self) -> int:
        return len(self.mean) if len(self.mean) > 1 else 0

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        cond = self.conditions(rng)
        x0 = self._draw(rng, cond, dtype) if "x0" in needs else None
        return Batch(cond, (len(rng), *self.shape), x0)

    def conditions(self, rng: Rng) -> Cond:
        return uniform_classes(rng, self.num_classes)

    def reference(self) -> Reference:
        """10,000 draws with a seed of their own."""
        rng = Rng(20240717, 0, "reference", range(10_000))
        cond = self.conditions(rng)
        return Reference(self.name, self._draw(rng, cond, torch.float32), cond.get("label"))

    def features(self) -> None:
        return None

    def _draw(self, rng: Rng, cond: Cond, dtype: torch.dtype) -> Tensor:
        row = cond["label"] if self.num_classes else torch.zeros(len(rng), dtype=torch.long, device=rng.device)
        mean = torch.tensor([list(r) for r in self.mean], dtype=dtype, device=rng.device)[row]
        std = torch.tensor([list(r) for r in self.std], dtype=dtype, device=rng.device)[row]
        return mean + std * rng.normal((len(rng), *self.shape), dtype)
