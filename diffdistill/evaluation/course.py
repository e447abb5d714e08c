"""The course of a run, as its vital signs were measured, and what is said of one of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Line = Mapping[str, Any]
Found = TypeVar("Found")
State = Literal["well", "alarm", "unknown"]

LATE = 2 / 3  # of the steps: what grows slowly has to be there; a cosine leaves a quarter of its rate


@dataclass(frozen=True)
class Verdict:
    """name: of the sign.  state: `unknown` where it was not measured.  words: what was found.  figure, threshold: None
    where there are none.  fix: the first thing to try, for an alarm.  step: when the alarm was first raised.
    """

    name: str
    state: State
    words: str
    figure: float | None = None
    threshold: float | None = None
    fix: str = ""
    step: int | None = None

    @property
    def line(self) -> str:
        """An alarm in one line."""
        figure = "" if self.figure is None else f" ({self.figure:.3g}, threshold {self.threshold:g})"
        return f"{self.name}: {self.words}{figure}. Try first: {self.fix}"


@dataclass(frozen=True)
class Course:
    """A run so far. steps: it is to take.  idle: seconds since it wrote, while it is going on; None otherwise."""

    lines: Sequence[Line]
    steps: int
    idle: float | None = None

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, figure), in order."""
        return [(line["step"], float(line[key])) for line in self.lines if isinstance(line.get(key), (int, float))]

    def keys(self, prefix: str) -> list[str]:
        """Of figures, without the prefix."""
        found = dict.fromkeys(key for line in self.lines for key in line if key.startswith(prefix))
        return [key.removeprefix(prefix) for key in found]

    def recent(self, key: str, num: int = 3) -> float | None:
        """Median of the last `num` figures; None unless there are two."""
        values = [value for _, value in self.series(key)][-num:]
        return statistics.median(values) if len(values) > 1 else None

    def settled(self, key: str, of: Callable[[float], float] = float, below: bool = False) -> float | None:
        """What two of the last three late looks reach: the second worst of `of` their figures.

        None unless there are two. below: whether small is bad.
        """
        late = sorted((of(value) for value in self.late(self.series(key))), reverse=not below)
        return late[1] if len(late) > 1 else None

    def late(self, series: Sequence[tuple[int, Found]]) -> list[Found]:
        """What the last three looks found, of those from two thirds of the steps on."""
        return [found for step, found in series if step >= LATE * self.steps][-3:]

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)
