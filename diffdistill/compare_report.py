"""The table and the pictures of a comparison."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from diffdistill.config import build
from diffdistill.data import Data
from diffdistill.evaluation import harness, plots
from diffdistill.pictures import MOST_CLASSES, MOST_CLIPS, shown_classes, where
from diffdistill.recipe import assemble
from diffdistill.saved_run import load_run

ON_IMAGES = ("fd_pixel", "fd", "label_agreement", "precision", "recall", "coverage", "memorised", "nfe")
ON_VIDEOS = ("frame_fd", "frame_fd_pixel", "velocity_error", "label_agreement", "nfe")
ON_POINTS = ("modes", "mode_share", "kl", "w2", "swd", "recall", "coverage", "nfe")
COST = ("cpu_seconds", "peak_memory_bytes", "iterations", "steps")
DISTANCES = ("fd_pixel", "kl", "swd", "fd", "frame_fd")  # the first that was measured ranks the methods


@dataclass(frozen=True)
class Row:
    """One line of the table. figures: of the generator.  cpu_seconds: of training, with making pairs.  updates: of the
    student.  error: why there are no figures."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    updates: int | None = None
    steps: int | None = None
    error: str | None = None

    def cells(self, columns: Sequence[str]) -> dict[str, Any]:
        """Column -> value; those without one are left out."""
        cost = {
            "cpu_seconds": self.cpu_seconds,
            "peak_memory_bytes": self.peak_bytes,
            "iterations": self.updates,
            "steps": self.steps,
        }
        found = {**self.figures, **{key: value for key, value in cost.items() if value is not None}}
        return {column: found[column] for column in columns if column in found}


def write_report(
    folder: Path, settings: DictConfig, shared: Mapping[str, Any], rows: Sequence[Row], console: Console
) -> list[Path]:
    """Write table.csv, table.md, table.json, distance_against_cost.png and samples.png; print the table."""
    data: Data = build(settings.data)
    wanted = {3: ON_IMAGES, 4: ON_VIDEOS}.get(len(data.shape), ON_POINTS)
    columns = [c for c in (*wanted, *COST) if any(c in row.cells((c,)) for row in rows)]
    distance = next((name for name in DISTANCES if any(name in row.figures for row in rows)), None)
    ranked = _ranked(rows, distance)
    _csv(folder / "table.csv", ranked, columns)
    (folder / "table.md").write_text(markdown(ranked, columns) + "\n")
    content = {"schema": 1, **shared, "columns": columns, "rows": [asdict(row) for row in ranked]}
    (folder / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    console.print(_table(ranked, [c for c in columns if c in (*columns[:4], "nfe", "cpu_seconds", "iterations")]))
    files = [folder / "table.md", folder / "table.csv"]
    if distance is not None:
        files.append(_plot(folder, ranked, distance))
    files.append(_samples(folder, settings, data, ranked))
    return files


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The table as Markdown, intervals in brackets."""
    lines = [f"| method | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    lines += [f"| {row.name} | {' | '.join(cell(row, column) for column in columns)} |" for row in rows]
    lines += [f"\n{row.name}: {row.error}" for row in rows if row.error]
    return "\n".join(lines)


def _ranked(rows: Sequence[Row], distance: str | None) -> list[Row]:
    """Teachers first, then methods by distance, failed ones last."""
    teachers = [row for row in rows if row.steps is None]
    methods = [row for row in rows if row.steps is not None]
    far = float("inf")
    return [*teachers, *sorted(methods, key=lambda row: (row.figures.get(distance or "", far), row.name))]


def _csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    measured = {name for row in rows for name in row.figures}
    with_intervals = [name for c in columns for name in (c, f"{c}_ci") if name == c or name in measured]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *_split(with_intervals), "error"])
        for row in rows:
            cells: list[Any] = []
            for name in with_intervals:
                value = row.cells((name,)).get(name, row.figures.get(name))
                cells += (value or ("", "")) if name.endswith("_ci") else [value if value is not None else ""]
            writer.writerow([row.name, *cells, row.error or ""])


def _split(names: Sequence[str]) -> list[str]:
    return [part for name in names for part in ((f"{name}_low", f"{name}_high") if name.endswith("_ci") else (name,))]


def _table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    table = Table("method", *columns)
    for row in rows:
        table.add_row(row.name, *(cell(row, column, brief=True) for column in columns))
    return table


def cell(row: Row, column: str, brief: bool = False) -> str:
    """A figure in words, with its interval unless it is to be brief."""
    if row.error:
        return "diverged"
    value = row.cells((column,)).get(column)
    if value is None:
        return "-"
    if column == "peak_memory_bytes":
        return f"{value / 2**20:.0f} MiB"
    if column == "cpu_seconds":
        return f"{value:.0f}"
    text = str(value) if isinstance(value, int) else f"{value:.4g}"
    interval = row.figures.get(f"{column}_ci")
    return text if interval is None or brief else f"{text} [{interval[0]:.3g}, {interval[1]:.3g}]"


def _plot(folder: Path, rows: Sequence[Row], distance: str) -> Path:
    path = folder / "distance_against_cost.png"
    points = {
        row.name: (row.cpu_seconds, row.figures[distance])
        for row in rows
        if row.cpu_seconds and drawable(row, distance)
    }
    lines = {row.name: row.figures[distance] for row in rows if row.steps is None and drawable(row, distance)}
    plots.distance_against_cost(points, lines, ("CPU seconds of training", distance), path)
    return path


def drawable(row: Row, distance: str) -> bool:
    """Whether a logarithmic axis has a place for it: an estimate of KL may be below 0, or infinite for one point."""
    return 0 < row.figures.get(distance, 0) < float("inf")


def _samples(folder: Path, settings: DictConfig, data: Data, rows: Sequence[Row]) -> Path:
    """All generators and the teacher from the same noise and classes; titles: name, network evaluations."""
    path = folder / "samples.png"
    columns = data.num_classes if 2 <= data.num_classes <= MOST_CLASSES else 8
    num = {3: 6 * columns, 4: MOST_CLIPS}.get(len(data.shape), 2000)
    labels = shown_classes(data, num)
    recipe = assemble(settings)
    samplers: dict[str, Any] = {f"teacher, {recipe.sampler.nfe}": recipe.sampler}
    panels: dict[str, torch.Tensor] = {}
    for row in rows:
        if row.steps is not None and not row.error:
            samplers[row.name if "nfe" not in row.figures else f"{row.name}, {row.figures['nfe']}"] = folder / row.name
    for title, source in samplers.items():
        if isinstance(source, Path):
            recipe, _ = load_run(str(source))
            source = recipe.distiller.generator
        with torch.no_grad():
            drawn = harness.draw(source, data, num, 0, 500, *where(recipe.networks), labels)[0]
        # of a clip its middle frame
        panels[title] = drawn[:, :, drawn.shape[2] // 2] if drawn.ndim == 5 else drawn
    plots.panels(panels, data.reference().data, path, columns)
    return path
