"""What a run kept of its samples as pictures of a page: PNG inside the page, points as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from diffdistill.evaluation import svg

TILE = 40  # pixels of a page that a sample has at least, in each direction
STRIP = 5  # samples of a strip


@dataclass(frozen=True)
class Picture:
    """caption: below it.  content: an image of PNG data, or SVG."""

    caption: str
    content: Markup


@dataclass(frozen=True)
class Frame:
    """Of points: reference [m, d] behind them, and (low, high) of a square around it, in each coordinate."""

    reference: Tensor
    bounds: tuple[tuple[float, float], tuple[float, float]]


def frame_of(points: Tensor) -> Frame:
    """A frame around points [m, d], with a margin. Points that are not finite do not count."""
    finite = points[torch.isfinite(points).all(1)]
    if not len(finite):
        return Frame(points[:0], ((-1.0, 1.0), (-1.0, 1.0)))
    low, high = finite.amin(0), finite.amax(0)
    middle, half = (low + high) / 2, max(0.65 * float((high - low).max()), 1e-6)
    bounds = [(float(centre) - half, float(centre) + half) for centre in middle[:2]]
    return Frame(finite, (bounds[0], bounds[-1]))


def picture(samples: Tensor, caption: str, columns: int, frame: Frame | None) -> Picture:
    """Samples as `small_samples` keeps them: a grid of pictures, clips one row each, points in their frame."""
    if samples.ndim == 2:
        frame = frame or frame_of(samples)
        rows = samples.tolist()
        out = sum(not svg.inside(row, frame.bounds) for row in rows)
        told = f"{caption}, {out} of {len(rows)} outside" if out else caption
        return Picture(told, svg.scatter(rows, frame.reference.tolist(), frame.bounds))
    if samples.ndim == 5:
        return Picture(caption, png(samples.transpose(1, 2).flatten(0, 1), samples.shape[2]))
    return Picture(caption, png(samples, columns))


def strip(x0: Tensor, times: Sequence[float], samples: Tensor, columns: int, frame: Frame | None) -> list[Picture]:
    """One column per time, then the samples: a few of the first `columns` below each other, of clips the frames of the
    first."""
    parts = [
        (f"{time:.0f}" if time >= 10 else svg.number(time, 2), values) for time, values in zip(times, x0, strict=True)
    ]
    found = []
    for caption, values in [*parts, ("end", samples)]:
        if values.ndim == 2:
            found.append(picture(values, caption, 1, frame))
        else:
            shown = values[0].transpose(0, 1) if values.ndim == 5 else _some(values[:columns])
            found.append(Picture(caption, png(shown, 1)))
    return found


def _some(values: Tensor) -> Tensor:
    """A few pictures, evenly spaced: of other classes where there are classes."""
    return values[torch.linspace(0, len(values) - 1, min(STRIP, len(values))).round().long()]


def png(tiles: Tensor, columns: int) -> Markup:
    """Tiles uint8 [n, 1 or 3, H, W] as one picture, see-through between them; small ones are shown enlarged."""
    columns = min(columns, len(tiles))
    num, channels, height, width = tiles.shape
    rows = -(-num // columns)
    sheet = torch.zeros(rows * (height + 1) - 1, columns * (width + 1) - 1, channels + 1, dtype=torch.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, left : left + width, :channels] = tile.permute(1, 2, 0)
        sheet[top : top + height, left : left + width, channels] = 255
    target = io.BytesIO()
    Image.fromarray(sheet.numpy(), "LA" if channels == 1 else "RGBA").save(target, "PNG", optimize=True)
    data = base64.b64encode(target.getvalue()).decode()
    scale = max(1, -(-TILE // max(height, width)))
    shown = f"width:{sheet.shape[1] * scale}px"
    return Markup(f'<img class="pixels" style="{shown}" alt="{num} samples" src="data:image/png;base64,{data}">')
