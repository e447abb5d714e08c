"""What steps cost, part by part, beside the steps themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdistill.bench_step import ARITHMETIC, UPDATES
from diffdistill.evaluation.plots import check_picture

KINDS = {"network passes": "C0", "updates": "C2", "data, noise and loss arithmetic": "C1"}


def plot_steps(results: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """A bar per result: the parts as shares of their sum, the steps as a mark, their ratio in words."""
    check_picture(path, "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 0.32 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, result in enumerate(results):
        left, total = 0.0, result["sum_milliseconds"]
        for kind, width in zip(KINDS, _shares(result), strict=True):
            axes.barh(row, width / total, left=left, color=KINDS[kind], height=0.7, label=kind if row == 0 else None)
            left += width / total
        axes.plot(
            [result["ratio"]] * 2, [row - 0.45, row + 0.45], color="black", label="the steps" if row == 0 else None
        )
        axes.text(max(1.0, result["ratio"]) + 0.01, row, f"{result['ratio']:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [f"{r['distiller']}, {r['networks']}" for r in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(1.0, *(r["ratio"] for r in results)))
    axes.set_xlabel("share of the sum of the parts", fontsize=9)
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(str(path), dpi=120)


def _shares(result: Mapping[str, Any]) -> tuple[float, float, float]:
    own = {part["name"]: part["milliseconds"] for part in result["parts"]}
    return result["passes_milliseconds"], own[UPDATES], own[ARITHMETIC]
