"""What a run's vital signs mean: from the lines of metrics.jsonl to verdicts in words. Live and afterwards alike."""

from __future__ import annotations

from diffdistill.evaluation.course import Course, Verdict
from diffdistill.evaluation.signs import SIGNS


def judge(course: Course) -> list[Verdict]:
    """A verdict for each sign; an alarm that was ever raised stands, as it was first raised."""
    raised: dict[str, Verdict] = {}
    looks = [line for line in course.lines if any(key.startswith("health/") for key in line)]
    for number in range(1, len(looks) + 1):
        for verdict in now(Course(looks[:number], course.steps)):
            if verdict.state == "alarm":
                raised.setdefault(verdict.name, verdict)
    return [raised.get(verdict.name, verdict) for verdict in now(course)]


def now(course: Course) -> list[Verdict]:
    """A verdict for each sign as the last measurements have it."""
    return [sign(course) for sign in SIGNS]
