"""What figures are made of: one row per sample for each thing that some metric looks at.

A block of samples becomes rows once and is then forgotten, so that a set may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from . import motion as moving
from . import sliced, tracking
from .features import Classifier, FeatureNetwork, WholePictures

Rows = Mapping[str, Tensor]  # column -> [N, ...]
Side = Literal["samples", "reference"]
BLOCK = 1000
T = TypeVar("T")

# metric -> columns it needs of the samples, and of the reference
COLUMNS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fd_pixel": (("values",), ("values",)),
    "fd": (("features",), ("features",)),
    "fid": (("features",), ("features",)),
    "kid": (("features",), ("features",)),
    "label_agreement": (("agreement",), ()),
    "memorised": (("values",), ("values",)),
    "clip_score": (("clip_score",), ()),
    "swd": (("projections",), ("projections",)),
    "modes": (("values",), ()),
    "kl": (("values",), ()),
    "w2": (("values",), ("values",)),
    "diversity": (("features", "label"), ("features", "label")),
    "frame_fd": (("frames",), ("frames",)),
    "frame_fd_pixel": (("small_frames",), ("small_frames",)),
    "velocity_error": (("velocity_error",), ()),
    "motion": (("movement",), ("movement",)),
}


class PromptScore(Protocol):
    """How well images [B, C, H, W] in [-1, 1] fit their prompts, [B]; sha256: of its weights."""

    sha256: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


def columns(metrics: Iterable[str], side: Side, prdc_space: Literal["values", "features"]) -> frozenset[str]:
    """The columns that these metrics need of one side."""
    known = {**COLUMNS, "prdc": ((prdc_space,), (prdc_space,))}
    return frozenset(c for name in metrics if name in known for c in known[name][0 if side == "samples" else 1])


@dataclass(frozen=True)
class Extract:
    """Makes rows of samples.

    columns: to make.  features: the space of fd, kid, prdc, diversity and frame_fd.  classifier: judges labels.
    motion: the law of clips, where it is known.  prompt_score: for clip_score.
    """

    columns: frozenset[str]
    features: FeatureNetwork | None = None
    classifier: Classifier | None = None
    motion: tracking.Motion | None = None
    prompt_score: PromptScore | None = None

    @torch.no_grad()
    def __call__(
        self, samples: Tensor, labels: Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Rows of samples [n, ...]: images [n, C, H, W] and clips [n, C, T, H, W] clipped to [-1, 1], points not."""
        x = samples.detach().float().cpu()
        if x.ndim in (4, 5):
            x = x.clamp(-1, 1)
        makers: dict[str, Callable[[], Tensor]] = {
            "values": lambda: x.flatten(1),
            "projections": lambda: sliced.projections(x),
            "features": lambda: by_block(_given(self.features).features, x),
            "agreement": lambda: self._agreement(x, _given(labels)),
            "label": lambda: torch.zeros(len(x), dtype=torch.long) if labels is None else labels.cpu().long(),
            "clip_score": lambda: _given(self.prompt_score)(x, _given(prompts)).double().cpu(),
            "frames": lambda: self._frames(x),
            "small_frames": lambda: tracking.small_frames(x).flatten(1).view(len(x), x.shape[2], -1),
            "velocity_error": lambda: tracking.velocity_errors(x, _given(labels), _given(self.motion)),
            "movement": lambda: moving.movement(x),
        }
        return {name: makers[name]() for name in sorted(self.columns)}

    def _agreement(self, x: Tensor, labels: Tensor) -> Tensor:
        """1 where the classifier sees what was asked for, [n]."""
        network = _given(self.classifier)
        if x.ndim == 5:
            return tracking.shown_agreements(x, labels, _given(self.motion), network)
        return (by_block(network.logits, x).argmax(1) == labels.cpu()).double()

    def _frames(self, x: Tensor) -> Tensor:
        """Features of every frame [n, T, d]: of what moves where the law tells its size, else of the whole frame."""
        network = _given(self.features)
        if self.motion is None or isinstance(network, WholePictures):
            frames = x.transpose(1, 2).flatten(0, 1)
        else:
            frames = tracking.windows(x, self.motion.side)
        return by_block(network.features, frames).view(len(x), x.shape[2], -1)


def by_block(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """network(images), [n, d], a block of images at a time to bound the memory of its layers."""
    return torch.cat([network(block) for block in images.split(BLOCK)])


def _given(value: T | None) -> T:
    assert value is not None, "checked before anything was drawn"
    return value
