"""Early stop: a run ends before its steps are over, when a figure is good enough or has long not become better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffdistill.errors import UserError

HIGHER_IS_BETTER = (
    "label_agreement", "precision", "recall", "density", "coverage", "clip_score", "modes", "mode_share", "diversity",
)  # fmt: skip
LOWER_IS_BETTER = (
    "fd_pixel", "fd", "fid", "kid", "swd", "w2", "kl", "frame_fd", "frame_fd_pixel", "velocity_error", "memorised",
)  # fmt: skip
OF_SEVERAL = {"prdc": ("precision", "recall", "density", "coverage"), "modes": ("modes", "mode_share")}
RANKING = ("fd_pixel", "fd", "kid", "swd")  # what ranks checkpoints unless asked otherwise: the first that there is


@dataclass(frozen=True)
class EarlyStop:
    """metric: a figure of the evaluations inside the run; null: the run takes all its steps.  target: it ends when the
    figure is that good.  patience: it ends after so many evaluations in a row without a new best.  The metric also
    decides which checkpoint is the best.
    """

    metric: str | None = None
    target: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.metric is None:
            for name, value in (("target", self.target), ("patience", self.patience)):
                if value is not None:
                    fix = "Name a figure, for example evaluation.stop.metric=fd_pixel."
                    raise UserError(f"{name}, metric", "must be given together", f"{value} and null", fix)
            return
        known = (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)
        if self.metric not in known:
            raise UserError("metric", f"must be among {', '.join(known)}", self.metric, "Take a name from that list.")
        if self.target is None and self.patience is None:
            given = f"{self.metric} alone"
            raise UserError("metric, target, patience", "must hold a target, patience or both", given, "Give one.")
        if self.patience is not None and self.patience < 1:
            raise UserError("patience", "must be >= 1", self.patience, "3 is a good number.")

    def check(self, measured: Sequence[str]) -> None:
        """Refuse a metric that evaluations do not have. measured: names of `evaluation.metrics`."""
        found = [figure for name in measured for figure in OF_SEVERAL.get(name, (name,))]
        if self.metric is not None and self.metric not in found:
            there = ", ".join(name for name in found if name in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)) or "none"
            fix = "Take one of those, or add it to evaluation.metrics."
            raise UserError("evaluation.stop.metric", f"must be measured: {there}", self.metric, fix)

    def reason(self, lines: Iterable[Mapping[str, Any]]) -> Reason | None:
        """Why a run with these lines of metrics has to end; None if it goes on."""
        if self.metric is None:
            return None
        found = figures(lines, self.metric)
        if not found:
            return None
        sign = direction(self.metric)
        last, value = found[-1]
        best = min(found, key=lambda pair: (sign * pair[1], pair[0]))
        if self.target is not None and sign * value <= sign * self.target:
            return Reason(self.metric, value, last, best[1], best[0], f"reached the target {self.target:g}")
        waited = sum(step > best[0] for step, _ in found)
        if self.patience is not None and waited >= self.patience:
            times = f"{waited} evaluation{'s' if waited > 1 else ''}"
            why = f"no better than {best[1]:.4g}, of step {best[0]}, in {times}"
            return Reason(self.metric, value, last, best[1], best[0], why)
        return None


@dataclass(frozen=True)
class Reason:
    """value: of the metric at `step`, where the run ended.  best: its best, at `best_step`.  why: in words."""

    metric: str
    value: float
    step: int
    best: float
    best_step: int
    why: str


def direction(metric: str) -> int:
    """1 where lower is better, -1 where higher is."""
    return -1 if metric in HIGHER_IS_BETTER else 1


def figures(lines: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(step, figure) of the evaluations inside a run, in order."""
    key = f"evaluation/{metric}"
    return [(line["step"], float(line[key])) for line in lines if line.get(key) is not None]


def loss_of(line: Mapping[str, Any], metric: str | None) -> float | None:
    """What ranks the checkpoint of an evaluation, lower is better; None where the line has no such figure.

    metric: None is the first of RANKING that the evaluation has.
    """
    for name in RANKING if metric is None else (metric,):
        if (figure := line.get(f"evaluation/{name}")) is not None:
            return direction(name) * float(figure)
    return None
