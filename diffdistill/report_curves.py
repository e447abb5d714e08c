"""The curves of a run's report: losses, gradients, rates, evaluations and vital signs over steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from diffdistill.evaluation import signs
from diffdistill.evaluation.course import Course
from diffdistill.evaluation.svg import COLOURS, Curve, line_chart, number

# of the vital signs: what is drawn together, its name, and the thresholds of `signs`
_SIGNS: tuple[tuple[str, str, Mapping[str, float]], ...] = (
    ("update/", "step size beside the weights", {"alarm above": signs.UPDATE}),
    ("average/", "distance of weights from their average", {"alarm above": signs.APART}),
    ("lag/", "critic lag: its error that a shift and a scale would mend", {"alarm above": signs.LAG}),
    ("sample/distance", "distance of the samples from the right law", {}),
    ("sample/mean", "mean of the samples, off by (in stds)", {"alarm above": signs.MEAN}),
    ("sample/std", "std of the samples, as a multiple", {"alarm above": signs.STD, "alarm below": 1 / signs.STD}),
    ("sample/saturated", "share of values beyond the range", {"alarm above": signs.SATURATED}),
    ("sample/spread", "spread under one condition", {"alarm below": signs.SPREAD}),
    ("sample/memorised", "share of copies", {"alarm above": signs.MEMORISED}),
    ("condition/", "condition heeded, 1 is exact", {"alarm below": signs.HEEDED}),
    ("times/", "times asked outside those trained at", {"alarm above": signs.OUTSIDE}),
    ("term/", "gradient of each term", {}),
)
_ASIDE = ("_doubt", "_first", "_low", "_high", "_beyond", "telling")  # parts of other signs
_OWN = ("evaluation/", "health/", "time/", "lr/", "grad_norm/")


@dataclass(frozen=True)
class Chart:
    """legend: (name, colour class) of each curve, where there are several.  levels: of dashed lines, in words."""

    title: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...] = ()
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Charts under one heading. note: what has to be known to read them."""

    title: str
    charts: Sequence[Chart]
    note: str = ""


def groups(course: Course, teacher: Mapping[str, Any]) -> list[Group]:
    """All curves of a run. teacher: its figures, drawn as levels."""
    found = [
        Group("Evaluations during training", list(_evaluations(course, teacher)),
              "Bars are bootstrap intervals; dashed: the teacher, measured on the samples of the table above. Fewer "
              "samples read higher in a Fréchet distance."),
        Group("Loss terms", list(_losses(course))),
        Group("Gradients and rates", list(_together(course))),
        Group("Vital signs", list(_vital(course)), "Dashed: the thresholds that verdicts are held against."),
    ]  # fmt: skip
    return [group for group in found if group.charts]


def _evaluations(course: Course, teacher: Mapping[str, Any]) -> Iterator[Chart]:
    for name in course.keys("evaluation/"):
        key = f"evaluation/{name}"
        points = course.series(key)
        if not points or name in ("nfe", "latency_ms"):
            continue
        # an interval belongs to the line of its figure
        ends = [line.get(f"{key}_ci") for line in course.lines if isinstance(line.get(key), int | float)]
        whole = all(isinstance(pair, list) and len(pair) == 2 for pair in ends)
        low, high = zip(*ends, strict=True) if whole else ((), ())
        levels = {"teacher": float(teacher[name])} if isinstance(teacher.get(name), int | float) else {}
        yield from _chart(name, [Curve(name, points, low, high)], levels)


def _losses(course: Course) -> Iterator[Chart]:
    for name in course.keys(""):
        if "/" in name and not name.startswith(_OWN):
            yield from _chart(name, [Curve(name, course.series(name))])


def _together(course: Course) -> Iterator[Chart]:
    for prefix, title in (("grad_norm/", "gradient norm, before clipping"), ("lr/", "learning rate")):
        yield from _chart(title, [Curve(role, course.series(prefix + role)) for role in course.keys(prefix)])
    yield from _chart("seconds per step", [Curve("step", course.series("time/step_seconds"))])


def _vital(course: Course) -> Iterator[Chart]:
    for prefix, title, levels in _SIGNS:
        curves = []
        for rest in course.keys(f"health/{prefix}"):
            if (prefix + rest).endswith(_ASIDE) or (not prefix.endswith("/") and rest):
                continue
            key = f"health/{prefix}{rest}"
            points, doubts = course.series(key), course.series(f"{key}_doubt")
            low: tuple[float, ...] = ()
            high: tuple[float, ...] = ()
            if doubts and len(doubts) == len(points):
                low = tuple(y - doubt for (_, y), (_, doubt) in zip(points, doubts, strict=True))
                high = tuple(y + doubt for (_, y), (_, doubt) in zip(points, doubts, strict=True))
            curves.append(Curve(rest.removesuffix("_outside") or prefix.split("/")[-1], points, low, high))
        yield from _chart(title, curves, levels)


def _chart(title: str, curves: Sequence[Curve], levels: Mapping[str, float] | None = None) -> Iterator[Chart]:
    """One chart, if there is anything to draw."""
    curves = [curve for curve in curves if curve.finite]
    if not curves:
        return
    legend = tuple((curve.name, f"c{index % COLOURS}") for index, curve in enumerate(curves))
    told = tuple(f"{name} {number(value)}" for name, value in (levels or {}).items() if math.isfinite(value))
    yield Chart(title, line_chart(curves, levels, title), legend if len(legend) > 1 else (), told)
