"""Pictures of samples: image grids and 2-D scatter plots."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdistill.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")


def check_picture(path: str | Path, key: str = "out") -> None:
    """Refuse the name of a picture, given as `key`, that says no format."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(key, f"must end in one of {', '.join(SUFFIXES)}", str(path), f"Write {key}=NAME.png.")


def _torchvision_utils() -> Any:
    """torchvision.utils, without the warnings about torch.jit that importing torchvision shows users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from torchvision import utils
    return utils


def sample_grid(images: Tensor, path: str | Path, columns: int = 8, scale: int = 8) -> None:
    """Write images [n, C, H, W] in [-1, 1] (clipped) to `path` as a PNG, `columns` per row.

    scale: side of the square each pixel becomes, so that 8x8 images can be seen.
    """
    check_picture(path)
    utils = _torchvision_utils()

    enlarged = images.detach().float().cpu().clamp(-1, 1)
    enlarged = enlarged.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    utils.save_image(enlarged, str(path), nrow=columns, padding=2, pad_value=1.0, normalize=True, value_range=(-1, 1))


def film_strips(videos: Tensor, path: str | Path, most: int = 8, scale: int = 3) -> None:
    """Write videos [n, C, T, H, W] in [-1, 1] to `path`, one row each of at most `most` frames, evenly spaced."""
    shown = videos[:, :, :: -(-videos.shape[2] // most)].transpose(1, 2)
    sample_grid(shown.flatten(0, 1), path, columns=shown.shape[1], scale=scale)


def scatter(samples: Tensor, reference: Tensor, path: str | Path) -> None:
    """Plot samples [n, 2] over reference [m, 2] on equal axes and write the figure to `path`.

    Of more coordinates the first two are shown, of one its histogram.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for points, label, colour in ((reference, "reference", "0.75"), (samples, "samples", "tab:blue")):
        xy = points.detach().float().cpu().numpy()
        name = f"{label} ({len(xy)})"
        if xy.shape[1] == 1:
            axes.hist(xy[:, 0], bins=60, density=True, color=colour, alpha=0.6, label=name)
        else:
            axes.scatter(xy[:, 0], xy[:, 1], s=3, c=colour, label=name, linewidths=0)
    if samples.shape[1] > 1:
        axes.set_aspect("equal")
    axes.legend(loc="upper right", markerscale=4)
    figure.savefig(str(path), dpi=120)


def panels(samples: Mapping[str, Tensor], reference: Tensor, path: str | Path, columns: int) -> None:
    """Write `panels_figure` to `path`."""
    check_picture(path)
    panels_figure(samples, reference, columns).savefig(str(path), dpi=100)


def panels_figure(samples: Mapping[str, Tensor], reference: Tensor, columns: int) -> Any:
    """One panel per name: images [n, C, H, W] in [-1, 1] as a grid of `columns`, points [n, d] over reference.

    Points share one frame, the reference's with a margin; those outside are counted in a corner. Of more coordinates
    the first two are shown, of one its histogram.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(4, len(samples))
    down = -(-len(samples) // across)
    first = next(iter(samples.values()))
    tall = -(-len(first) // columns) / columns if first.ndim == 4 else 1.0  # of a panel, in its widths
    size = (3.6 * across, (3.6 * tall + 0.3) * down)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[len(samples) :]:
        axes.axis("off")
    for axes, (title, values) in zip(grid, samples.items(), strict=False):
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        if values.ndim == 4:
            tiles = _torchvision_utils().make_grid(
                values.float().clamp(-1, 1).add(1).div(2), nrow=columns, padding=1, pad_value=1.0
            )
            axes.imshow(tiles.permute(1, 2, 0).numpy(), interpolation="nearest")
        else:
            _points(axes, values.float(), reference.float())
    return figure


def _points(axes: Any, values: Tensor, reference: Tensor) -> None:
    low, high = reference.amin(0), reference.amax(0)
    middle, half = (low + high) / 2, 0.8 * (high - low).max()  # a square: the box stays as laid out, below its title
    outside = int(((values - middle).abs() > half).any(1).sum())
    if outside:
        axes.text(0.02, 0.95, f"{outside} outside", transform=axes.transAxes, fontsize=8)
    across = (float(middle[0] - half), float(middle[0] + half))
    if values.shape[1] == 1:
        for points, colour in ((reference, "0.75"), (values, "tab:blue")):
            axes.hist(points[:, 0].numpy(), bins=60, range=across, density=True, color=colour, alpha=0.6)
        return
    axes.scatter(reference[:, 0], reference[:, 1], s=2, c="0.8", linewidths=0)
    axes.scatter(values[:, 0], values[:, 1], s=2, c="tab:blue", linewidths=0)
    axes.set_xlim(*across)
    axes.set_ylim(float(middle[1] - half), float(middle[1] + half))
    axes.set_aspect("equal")


def distance_against_cost(
    points: Mapping[str, tuple[float, float]], lines: Mapping[str, float], labels: tuple[str, str], path: str | Path
) -> None:
    """Plot (cost, distance) of each method, and distances without a cost as horizontal lines.

    Axes are logarithmic, that of cost where the costs differ by more than a factor of 4.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.5), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # names beside the points would cover each other where methods cost and reach the same
    for index, (name, (cost, distance)) in enumerate(sorted(points.items(), key=lambda item: item[1][1])):
        axes.scatter(
            [cost], [distance], s=36, color=f"C{index % 10}", marker="os^Dv"[index // 10 % 5], label=name, zorder=3
        )
    for index, (name, distance) in enumerate(lines.items()):
        axes.axhline(distance, color="0.4", linestyle=("--", ":", "-.")[index % 3], linewidth=1, label=name)
    costs = [cost for cost, _ in points.values()]
    if costs and max(costs) > 4 * min(costs):
        axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(True, which="both", linewidth=0.3)
    axes.margins(x=0.15, y=0.12)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, title="nearest first")
    figure.savefig(str(path), dpi=120)


def side_by_side(grids: Sequence[Tensor], titles: Sequence[str], path: str | Path, columns: int) -> None:
    """Write several sets of images [n, C, H, W] in [-1, 1] next to each other, each a grid under its title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(grids), 4.4), layout="tight")
    FigureCanvasAgg(figure)
    for axes, images, title in zip(figure.subplots(1, len(grids)), grids, titles, strict=True):
        grid = _torchvision_utils().make_grid(
            images.float().clamp(-1, 1).add(1).div(2), nrow=columns, padding=1, pad_value=1.0
        )
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(str(path), dpi=100)
