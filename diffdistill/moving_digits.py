"""Moving digits: clips of real scans that bounce on a black canvas, drawn when they are asked for.

A clip's class is its digit and the direction in which it sets out: what a prompt can tell a video model, and what can
be checked on the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from diffdistill.data import SCANS, Source, digit_scans, uniform_classes
from diffdistill.denoiser import Cond
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError, require_at_least
from diffdistill.evaluation.features import Classifier, load_features
from diffdistill.evaluation.reference import Reference
from diffdistill.rng import Rng

SIDE = 8  # of a scan, pixels
BLACK = -1.0
# (rows, columns) in strides per frame, image rows grow downwards
DIRECTIONS = {
    "up": (-1, 0),
    "up and right": (-1, 1),
    "right": (0, 1),
    "down and right": (1, 1),
    "down": (1, 0),
    "down and left": (1, -1),
    "left": (0, -1),
    "up and left": (-1, -1),
}
NUM_REFERENCE = 400  # clips


def prompts() -> list[str]:
    """What each class is in words; the last, empty one is the null condition's."""
    told = [f"digit {digit} moving {direction}" for digit in range(10) for direction in DIRECTIONS]
    return [*told, ""]


@dataclass(frozen=True)
class MovingDigits:
    """Clips [1, frames, size, size] in [-1, 1] of one scan that moves `stride` pixels per frame and axis, and bounces.

    frames, size: of a clip, pixels; 16 frames of 64 x 64 are 4,096 tokens in patches of 1 x 4 x 4.  stride: also the
    lattice of places; at the patch's size a patch always shows the same part of a digit, which a small transformer
    learns soon.  zoom: pixels of the canvas per pixel of a scan and axis; the digits of two frames in a row overlap
    where it exceeds stride / 8.  Digit, scan, direction and first place are uniform. Label digit * 8 + direction, 80
    classes, see `prompts`.
    """

    frames: int = 16
    size: int = 64
    stride: int = 2
    zoom: int = 2
    name: str = field(default="moving_digits", init=False)
    num_classes: int = field(default=10 * len(DIRECTIONS), init=False)
    provides: frozenset[str] = field(default=frozenset({"x0"}), init=False)
    source: Source = field(default=SCANS, init=False)

    def __post_init__(self) -> None:
        require_at_least(1, frames=self.frames, stride=self.stride, zoom=self.zoom)
        if self.size <= self.side or (self.size - self.side) % self.stride:
            constraint = f"must be {self.side}, the side of a digit, and a positive multiple of stride {self.stride}"
            raise UserError("data.size", constraint, self.size, "64 is the default.")

    @property
    def side(self) -> int:
        """Of a digit on the canvas, pixels."""
        return SIDE * self.zoom

    @property
    def room(self) -> int:
        """Strides from one end of an axis to the other."""
        return (self.size - self.side) // self.stride

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, self.frames, self.size, self.size)

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        cond = self.conditions(rng)
        x0 = self.render(rng, cond["label"], dtype) if "x0" in needs else None
        return Batch(cond, (len(rng), *self.shape), x0)

    def conditions(self, rng: Rng) -> Cond:
        return uniform_classes(rng, self.num_classes)

    def reference(self) -> Reference:
        """400 clips with a seed of their own."""
        return _reference(self)

    def features(self) -> Classifier:
        """Of the scans: what a frame shows is measured on the digit, brought back to the 8 x 8 pixels of a scan."""
        return load_features()

    @cached_property
    def _by_digit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scans sorted by digit, the first of each digit and how many there are."""
        images, labels = digit_scans()
        order = labels.argsort(stable=True)
        counts = labels.bincount(minlength=10)
        return images[order], counts.cumsum(0) - counts, counts

    def render(self, rng: Rng, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """A clip [B, *shape] of each label [B]; scan and first place are rng's."""
        images, first, counts = (x.to(labels.device) for x in self._by_digit)
        digit = self.shown(labels)
        share = rng.uniform((len(labels),), torch.float64)
        scan = first[digit] + (share * counts[digit]).long().clamp(max=counts[digit] - 1)
        start = torch.stack([rng.integers(self.room + 1, (len(labels),)) for _ in range(2)], 1)
        place = self.places(self.stride * start, labels)
        return self._pasted(images[scan, 0].to(dtype), place)

    def shown(self, labels: Tensor) -> Tensor:
        """The digit of each label, [B]."""
        return labels // len(DIRECTIONS)

    def places(self, start: Tensor, labels: Tensor) -> Tensor:
        """Top left corners [B, frames, 2] (row, column) of clips that begin at the place nearest to `start` [B, 2]."""
        start = self.stride * torch.round(start / self.stride).long()
        velocity = torch.tensor(list(DIRECTIONS.values()), device=labels.device)[labels % len(DIRECTIONS)]
        steps = torch.arange(self.frames, device=labels.device)
        moved = start[:, None] + self.stride * steps[:, None] * velocity[:, None]
        return bounced(moved, self.size - self.side)

    def _pasted(self, scans: Tensor, place: Tensor) -> Tensor:
        """Scans [B, 8, 8] on black canvases at places [B, T, 2], [B, 1, T, size, size]."""
        B, T = place.shape[:2]
        digits = scans.repeat_interleave(self.zoom, 1).repeat_interleave(self.zoom, 2)
        clips = torch.full((B, T, self.size, self.size), BLACK, dtype=scans.dtype, device=scans.device)
        inner = torch.arange(self.side, device=scans.device)
        whole = (B, T, self.side, self.side)
        rows = (place[..., 0, None] + inner)[..., :, None].expand(whole)
        columns = (place[..., 1, None] + inner)[..., None, :].expand(whole)
        b = torch.arange(B, device=scans.device).view(-1, 1, 1, 1).expand_as(rows)
        t = torch.arange(T, device=scans.device).view(1, -1, 1, 1).expand_as(rows)
        clips[b, t, rows, columns] = digits[:, None].expand(whole)
        return clips[:, None]


@lru_cache(maxsize=1)  # 100 MB of the default size
def _reference(data: MovingDigits) -> Reference:
    rng = Rng(20261127, 0, "reference", range(NUM_REFERENCE))
    labels = data.conditions(rng)["label"]
    return Reference(data.name, data.render(rng, labels, torch.float32), labels, motion=data)


def bounced(place: Tensor, limit: float) -> Tensor:
    """Places on a line without walls folded back into [0, limit]."""
    period = 2 * limit
    folded = place % period
    return torch.minimum(folded, period - folded)
