"""One picture of a sampler: a grid of images or a scatter plot of points."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffdistill import ranks
from diffdistill.data import Data
from diffdistill.evaluation import harness, plots
from diffdistill.networks.roles import Networks
from diffdistill.solvers import Sampler

MOST_CLASSES = 16  # with a column each
MOST_CLIPS = 8  # of a run's picture of videos, one row each


def draw_picture(
    data: Data, sampler: Sampler, num: int, seed: int, path: Path, networks: Networks | None = None
) -> None:
    """Draw images, one class per column where there are classes, one video per row, or a scatter plot of points.

    Of several processes each draws all, and the main one writes.
    """
    device, dtype = where(networks)
    labels = shown_classes(data, num)
    samples, _ = harness.draw(sampler, data, num, seed, 500, device, dtype, labels)
    ranks.on_main(lambda: _plot(samples, data, path))


def _plot(samples: Tensor, data: Data, path: Path) -> None:
    if samples.ndim == 3 or (samples.ndim > 3 and samples.shape[1] not in (1, 3)):
        samples = as_colours(samples)
    if samples.ndim == 5:
        plots.film_strips(samples, path)
    elif samples.ndim == 4:
        plots.sample_grid(samples, path, columns=columns_of(data))
    else:
        plots.scatter(samples, data.reference().data, path)


def columns_of(data: Data) -> int:
    """Of a grid of images: one per class while they are few."""
    return data.num_classes if 2 <= data.num_classes <= MOST_CLASSES else 8


def as_colours(latents: Tensor) -> Tensor:
    """Latents [B, C, *sizes] to look at: their first three channels, or one, scaled so that three standard deviations
    are black and white; of sound, [B, C, length], one grey picture of channels against time."""
    if latents.ndim == 3:
        latents = latents[:, None]
    shown = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1]
    return (shown - shown.mean()) / (3 * shown.std()).clamp(min=1e-6)


def shown_classes(data: Data, num: int) -> Tensor | None:
    """Classes of a picture of num samples, [num]: each in turn, or evenly spaced where there are more of them, and for
    videos; None without classes."""
    if not data.num_classes:
        return None
    if len(data.shape) == 4 or data.num_classes > num:
        return torch.arange(num) * data.num_classes // num
    return torch.arange(num) % data.num_classes


def where(networks: Networks | None) -> tuple[torch.device, torch.dtype]:
    return (torch.device("cpu"), torch.float32) if networks is None else (networks.device, networks.dtype)
