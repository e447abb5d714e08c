"""Captioned shapes: "a red circle at the top left", drawn when they are asked for. Text to image at toy size.

What a picture shows can be told from its pixels by a small classifier, so that a student can be asked whether it still
does what the prompt says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffdistill.data import PROCEDURAL, uniform_classes
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError, require_at_least
from diffdistill.evaluation.features import Classifier
from diffdistill.evaluation.reference import Reference
from diffdistill.evaluation.shape_features import load_shape_features
from diffdistill.prompts import ToldPrompts
from diffdistill.rng import Rng

SIZE = 32  # pixels
COLOURS = {
    "red": (0.9, -0.8, -0.8),
    "green": (-0.8, 0.6, -0.7),
    "blue": (-0.8, -0.6, 0.95),
    "yellow": (0.9, 0.8, -0.8),
    "purple": (0.4, -0.8, 0.6),
    "white": (0.9, 0.9, 0.9),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
COUNTS = (len(COLOURS), len(SHAPES), len(PLACES))
CENTRES = (7.5, 16.0, 24.5)  # of a place on an axis, pixels
JITTER = 1.5  # of a centre, pixels
RADII = (5.0, 6.5)  # pixels
GREYS = (-0.95, -0.6)  # of the ground
NUM_REFERENCE = 4000  # pictures


def captions() -> list[str]:
    """What each class is in words, in the order of `attributes`."""
    return [f"a {colour} {shape} at the {place}" for colour in COLOURS for shape in SHAPES for place in PLACES]


def attributes(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the colour, the shape and the place of each class [B]."""
    _, shapes, places = COUNTS
    return labels // (shapes * places), labels // places % shapes, labels % places


def render(rng: Rng, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A picture [B, 3, 32, 32] in [-1, 1] of each class [B]; size, jitter, brightness and ground are rng's."""
    colour, shape, place = attributes(labels)
    B = len(labels)
    radius, brightness, grey = (
        low + (high - low) * rng.uniform((B,), torch.float64) for low, high in (RADII, (0.8, 1.0), GREYS)
    )
    jitter = JITTER * (2 * rng.uniform((B, 2), torch.float64) - 1)
    axis = torch.tensor(CENTRES, dtype=torch.float64, device=labels.device)
    centre = torch.stack([axis[place // 3], axis[place % 3]], 1) + jitter
    pixels = torch.arange(SIZE, dtype=torch.float64, device=labels.device) + 0.5
    y = pixels.view(1, -1, 1) - centre[:, 0].view(-1, 1, 1)
    x = pixels.view(1, 1, -1) - centre[:, 1].view(-1, 1, 1)
    distances = _distances(x, y, radius.view(-1, 1, 1))
    chosen = torch.stack([torch.broadcast_to(d, (B, SIZE, SIZE)) for d in distances], 1)
    chosen = chosen[torch.arange(B, device=labels.device), shape]
    cover = (0.5 - chosen).clamp(0, 1)[:, None]  # of a pixel by the shape
    table = torch.tensor(list(COLOURS.values()), dtype=torch.float64, device=labels.device)
    paint = ((table[colour] + 1) * brightness[:, None] - 1)[..., None, None]
    return (cover * paint + (1 - cover) * grey.view(-1, 1, 1, 1)).to(dtype)


def _distances(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """Signed distances in pixels from the edge of each of SHAPES around the origin, rows grow downwards."""
    round_ = (x.square() + y.square()).sqrt()
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * r
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(slope * x.abs() - 0.5 * y - 0.6 * r, y - 0.6 * r)  # point up
    bar = 0.32 * r
    cross = torch.minimum(torch.maximum(x.abs() - bar, y.abs() - r), torch.maximum(y.abs() - bar, x.abs() - r))
    ring = (round_ - 0.78 * r).abs() - 0.22 * r
    return round_ - r, square, triangle, cross, ring


@dataclass(frozen=True)
class Shapes:
    """The shapes; `told` makes them samples of a network. batch_size: captions embedded at once."""

    batch_size: int = 64

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size)

    def told(self, network: Any, pipeline: str | None) -> ToldShapes:
        """The data set that `network`, from the pipeline folder or hub id `pipeline`, is trained on.

        Raises UserError where the network takes no text, or its pipeline makes pictures of another size.
        """
        from diffdistill.networks.families.stock import Stock
        from diffdistill.networks.families.words import embedded, latent_factors

        if not isinstance(network, Stock) or "text" not in network.needs or pipeline is None:
            fix = "Use networks=sd15 with networks.path, or networks=shapes_t2i."
            raise UserError("data", "shapes need a network that reads text", type(network).__name__, fix)
        shape, pixels = network.latents((SIZE, SIZE), 1, *latent_factors(pipeline))
        device = next(network.parameters()).device
        texts = captions()
        if device.type == "meta":  # a dry run: one caption shows what the others do
            cond, null = embedded(pipeline, network, texts[:1], None, self.batch_size, torch.device("cpu"))
            cond = {key: value.expand(len(texts), *value.shape[1:]) for key, value in cond.items()}
            device = torch.device("cpu")
        else:
            cond, null = embedded(pipeline, network, texts, None, self.batch_size, device)
        size = network.sized(*pixels)
        cond |= {key: value.expand(len(texts), -1) for key, value in size.items()}
        return ToldShapes(tuple(texts), shape, cond, null | size, PROCEDURAL, pipeline, device)

    def of_pipeline(self) -> ToldShapes:
        """The shapes for a whole pipeline, which embeds the captions itself."""
        return ToldShapes(tuple(captions()), (3, SIZE, SIZE), {}, {}, PROCEDURAL)


@dataclass(frozen=True, eq=False)
class ToldShapes(ToldPrompts):
    """Latents of drawn pictures with their embedded captions; a class is a caption."""

    name: str = field(default="shapes_t2i", init=False)
    provides: frozenset[str] = field(default=frozenset({"x0"}), init=False)

    @torch.no_grad()
    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        cond, shape = self.conditions(rng), (len(rng), *self.shape)
        if "x0" not in needs:
            return Batch(cond, shape)
        pictures = render(rng.fork("pictures"), cond["label"])
        return Batch(cond, shape, (pictures if self.codec is None else self.codec.encode(pictures)).to(dtype))

    def reference(self) -> Reference:
        """4,000 pictures with a seed of their own."""
        return self._reference

    @cached_property
    def _reference(self) -> Reference:
        rng = Rng(20261127, 0, "reference", range(NUM_REFERENCE))
        labels = uniform_classes(rng, self.num_classes)["label"]
        return Reference(self.name, render(rng, labels), labels)

    def features(self) -> Classifier:
        """A classifier of colour, shape and place; its classes are the captions."""
        return load_shape_features()
