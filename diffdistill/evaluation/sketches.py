"""Figures to look at while thinking, in a notebook: curves, paths and arrows in the plane. Each returns a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.plots import panels_figure

Scale = Literal["linear", "log"]
SIDE = 3.6  # inches of a panel


def panels(samples: Mapping[str, Tensor], reference: Tensor | None = None, columns: int = 10) -> Any:
    """One panel per name, images [n, C, H, W] in [-1, 1] or points [n, 2] over `reference`, as `plots.panels_figure`.

    reference: [m, 2]; None are the points of all panels, for their frame alone. columns: of a grid of images.
    """
    drawn = torch.cat([values.flatten(1) for values in samples.values()]) if reference is None else reference
    return panels_figure(samples, drawn, columns)


def curves(
    panels: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    across: str,
    scales: tuple[Scale, Scale] = ("linear", "linear"),
    marker: str = "",
) -> Any:
    """One panel per title, in it one curve per name through (x [n], y [n]).

    across: label of the horizontal axes.  scales: of both axes.  marker: matplotlib's, of the single points.
    """
    figure, grid = _figure(len(panels), 0.8)
    for axes, (title, named) in zip(grid, panels.items(), strict=True):
        for name, (x, y) in named.items():
            axes.plot(_plain(x), _plain(y), marker=marker, label=name)
        axes.set(title=title, xlabel=across, xscale=scales[0], yscale=scales[1])
        axes.grid(True, linewidth=0.3)
    labelled = [axes for axes, named in zip(grid, panels.values(), strict=True) if any(named)]
    if labelled:
        labelled[-1].legend(fontsize=8)
    return figure


def paths(named: Mapping[str, Tensor], reference: Tensor) -> Any:
    """One panel per name: paths [K, n, 2] of n points, which begin at a cross and end at a dot, over `reference`."""
    figure, grid = _figure(len(named), 1.0)
    for axes, (title, states) in zip(grid, named.items(), strict=True):
        axes.scatter(*_plain(reference.T), s=2, c="0.8", linewidths=0)
        for index in range(states.shape[1]):
            x, y = _plain(states[:, index].T)
            axes.plot(x, y, linewidth=0.8, alpha=0.8, color=f"C{index % 10}")
            axes.plot(x[0], y[0], "x", markersize=4, color=f"C{index % 10}")
            axes.plot(x[-1], y[-1], "o", markersize=3, color=f"C{index % 10}")
        axes.set_title(title)
        axes.set_aspect("equal")
    return figure


def arrows(named: Mapping[str, tuple[Tensor, Tensor]], reference: Tensor) -> Any:
    """One panel per name: an arrow (from [n, 2], along [n, 2]) at each point, all of a panel to one scale."""
    figure, grid = _figure(len(named), 1.0)
    for axes, (title, (points, directions)) in zip(grid, named.items(), strict=True):
        if points.shape != directions.shape or points.shape[-1] != 2:
            found = (tuple(points.shape), tuple(directions.shape))
            raise UserError("arrows", "must have points and directions [n, 2]", found, "Give a direction per point.")
        axes.scatter(*_plain(reference.T), s=2, c="0.8", linewidths=0)
        axes.quiver(*_plain(points.T), *_plain(directions.T), color="tab:blue", width=0.005)
        axes.set_title(title)
        axes.set_aspect("equal")
    return figure


def _figure(count: int, tall: float) -> tuple[Any, Any]:
    """A figure of `count` panels, `tall` times as high as wide, at most four in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    across = min(4, count)
    down = -(-count // across)
    figure = Figure(figsize=(SIDE * across, SIDE * tall * down), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.axis("off")
    return figure, grid[:count]


def _plain(values: Tensor) -> Any:
    return values.detach().double().cpu().numpy()
