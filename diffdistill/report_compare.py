"""What the report of a comparison says: its table, quality against cost, samples of each method from one noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from diffdistill.compare_report import COST, DISTANCES, ON_IMAGES, Row, cell, drawable
from diffdistill.evaluation.svg import cost_chart
from diffdistill.leaderboard import command, machines
from diffdistill.report_figures import WORDS, better
from diffdistill.report_pictures import Picture, frame_of, picture
from diffdistill.run_folder import read_json
from diffdistill.small_samples import kept_same_noise

DEFAULT = (*ON_IMAGES, *COST)


@dataclass(frozen=True)
class Line:
    """A row of the table. mark: its number in the plot.  link: to its own report, "" where there is none."""

    mark: str
    name: str
    link: str
    cells: Sequence[str]
    error: str


@dataclass(frozen=True)
class Page:
    """All that the template shows of a comparison."""

    title: str
    data: str
    columns: Sequence[tuple[str, str, str]]
    lines: Sequence[Line]
    distance: str
    plot: Markup
    pictures: Sequence[Picture]
    pictures_note: str
    command: str
    machines: Sequence[str]
    budget: Sequence[tuple[str, str]]


def page(folder: Path) -> Page:
    """Raises UserError if the comparison has no table yet."""
    plan = read_json(folder / "compare.json", "run")
    content = read_json(folder / "table.json", "run")
    table = [Row(**row) for row in content["rows"]]
    columns = content.get("columns", DEFAULT)  # older tables do not say
    distance = next((name for name in DISTANCES if any(name in row.figures for row in table)), "")
    marks = {row.name: str(index) for index, row in enumerate((r for r in table if r.steps is not None), 1)}
    points = {
        row.name: (float(row.cpu_seconds), float(row.figures[distance]))
        for row in table
        if row.cpu_seconds and drawable(row, distance)
    }
    levels = {row.name: float(row.figures[distance]) for row in table if row.steps is None and drawable(row, distance)}
    pictures, note = _pictures(folder, table)
    return Page(
        title=folder.resolve().name,
        data=str(plan["data"]),
        columns=[(name, WORDS.get(name, ""), "" if name in COST else better(name)) for name in columns],
        lines=[
            Line(
                marks.get(row.name, ""),
                row.name,
                f"{row.name}/report.html" if (folder / row.name / "report.html").is_file() else "",
                [cell(row, column) for column in columns],
                row.error or "",
            )
            for row in table
        ],
        distance=distance,
        plot=cost_chart(points, levels, ("CPU seconds of training", distance), marks),
        pictures=pictures,
        pictures_note=note,
        command=command(plan),
        machines=machines(plan),
        budget=[(name, str(value)) for name, value in plan["budget"].items() if value is not None],
    )


def _pictures(folder: Path, table: Sequence[Row]) -> tuple[list[Picture], str]:
    """The teacher, and each method from the same noise, as their runs kept them; and who is missing."""
    found: list[Picture] = []
    missing = []
    teachers = dict[bytes, Any]()
    for row in table:
        if row.steps is None:
            continue
        kept = kept_same_noise(folder / row.name)
        if kept is None:
            missing.append(row.name)
            continue
        frame = None if kept.reference is None else frame_of(kept.reference)
        key = kept.teacher.samples.contiguous().view(torch.uint8).numpy().tobytes()
        if key not in teachers:  # methods that guide it have a teacher of their own
            whose = "teacher" if not teachers else f"teacher of {row.name}"
            teachers[key] = picture(kept.teacher.samples, kept.teacher.caption(whose), kept.columns, frame)
        found.append(picture(kept.student.samples, kept.student.caption(row.name), kept.columns, frame))
    note = f"Not drawn, for their runs did not end or are older: {', '.join(missing)}." if missing else ""
    return [*teachers.values(), *found], note
