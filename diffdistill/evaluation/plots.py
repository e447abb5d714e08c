"""Pictures of samples: image grids and 2-D scatter plots."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def sample_grid(images: Tensor, path: str | Path, columns: int = 8, scale: int = 8) -> None:
    """Write images [n, C, H, W] in [-1, 1] (clipped) to `path` as a PNG, `columns` per row.

    scale: side of the square each pixel becomes, so that 8x8 images can be seen.
    """
    from torchvision.utils import save_image

    enlarged = images.detach().float().cpu().clamp(-1, 1)
    enlarged = enlarged.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    save_image(enlarged, str(path), nrow=columns, padding=2, pad_value=1.0, normalize=True, value_range=(-1, 1))


def scatter(samples: Tensor, reference: Tensor, path: str | Path) -> None:
    """Plot samples [n, 2] over reference [m, 2] on equal axes and write the figure to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for points, label, colour in ((reference, "reference", "0.75"), (samples, "samples", "tab:blue")):
        xy = points.detach().float().cpu().numpy()
        axes.scatter(xy[:, 0], xy[:, 1], s=3, c=colour, label=f"{label} ({len(xy)})", linewidths=0)
    axes.set_aspect("equal")
    axes.legend(loc="upper right", markerscale=4)
    figure.savefig(str(path), dpi=120)
