"""How far a run is and how it ended, from what lies in its folder: finished, going on, failed or stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

from diffdistill import checkpoint
from diffdistill.evaluation.course import Course
from diffdistill.run_folder import RunFolder

How = Literal["finished", "going on", "failed", "stopped"]


@dataclass(frozen=True)
class Condition:
    """how: a run is.  course: its lines of metrics so far.  step: that it has reached, logged or not.  failure: why it
    ended, where it failed."""

    how: How
    course: Course
    step: int
    failure: str | None = None

    @property
    def line(self) -> str:
        return f"{self.how}, step {self.step} of {self.course.steps}"


def condition_of(folder: RunFolder, settings: Mapping[str, Any]) -> Condition:
    """settings: the run's configuration."""
    steps = int(OmegaConf.select(OmegaConf.create({"of": settings.get("trainer")}), "of.steps", default=0))
    lines, going = list(folder.metrics()), folder.in_use
    file = folder.path / "metrics.jsonl"
    idle = time.time() - file.stat().st_mtime if going and file.is_file() and not folder.is_finished else None
    failure = next((str(line["failed"]) for line in lines if "failed" in line), None)
    how: How = "stopped"
    if folder.is_finished:
        how = "finished"
    elif going:
        how = "going on"
    elif failure is not None:
        how = "failed"
    course = Course(lines, steps, idle)
    saved = [int(path.name.removeprefix("step-")) for path in checkpoint.steps(folder.checkpoints)]
    return Condition(how, course, max([course.step, *saved]), failure)
