"""Rates on computed blocks beside the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffdistill.evaluation.plots import check_picture
from diffdistill.kernels.attention.bench_runners import Group

if TYPE_CHECKING:
    from diffdistill.kernels.attention.bench import Ceiling, Measured

LABELS = {
    "ours": "ours", "flex": "flex, compiled", "sdpa": "SDPA (dense)", "sdpa_flash": "FlashAttention-2 (dense)",
    "sdpa_cudnn": "cuDNN (dense)", "sdpa_efficient": "efficient (dense)", "gather_sdpa": "gather + SDPA",
    "gather_bmm": "gather + bmm",
}  # fmt: skip


def plot_rates(
    measured: Sequence[Measured],
    ceilings: Sequence[Ceiling],
    groups: Sequence[Group],
    path: str | Path,
    unit: tuple[str, float] = ("GF/s", 1.0),
) -> None:
    """One panel per group: rates against density of every runner, the ceiling as a line. unit: its name, GF/s in it."""
    check_picture(path, "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    across = min(4, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(3.6 * across, 3.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[len(groups) :]:
        axes.axis("off")
    for axes, group, top in zip(grid, groups, ceilings, strict=False):
        rows = [m for m in measured if group.name.items() <= vars(m).items()]
        for index, (runner, label) in enumerate(LABELS.items()):
            points = sorted((m.density, m.gflops / unit[1]) for m in rows if m.runner == runner)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", label=label)
        if top.gflops:
            axes.axhline(top.gflops / unit[1], color="0.3", linestyle="--", linewidth=1, label="ceiling")
        axes.set_xscale("log")
        axes.set_xlim(0.08, 1.25)
        axes.set_xticks([0.1, 0.3, 1], ["0.1", "0.3", "1"])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(f"{group.direction} {group.dtype}, S={group.length}, D={group.width}", fontsize=9)
        axes.set_xlabel("density of blocks", fontsize=8)
        axes.set_ylabel(f"{unit[0]} on computed blocks", fontsize=8)
    grid[0].legend(fontsize=7)
    figure.savefig(str(path), dpi=120)
