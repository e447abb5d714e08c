"""What this process is at: the watchdog and the dumps of stacks tell it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

BETWEEN = "between steps"


class _Course:
    """step: steps done.  open: activities that have begun, innermost last.  moved: when one began or ended last."""

    def __init__(self) -> None:
        self.step = 0
        self.open: list[str] = []
        self.moved = time.monotonic()


_course = _Course()


@contextmanager
def during(name: str) -> Iterator[None]:
    """Within, the process is at `name`: data, phase NAME, evaluate, save, export."""
    _course.open.append(name)
    _course.moved = time.monotonic()
    try:
        yield
    finally:
        _course.open.pop()
        _course.moved = time.monotonic()


def ended(step: int) -> None:
    """So many steps are done."""
    _course.step, _course.moved = step, time.monotonic()


def moved() -> float:
    """When an activity or a step began or ended last, on time.monotonic's clock."""
    return _course.moved


def described() -> str:
    """The activity and the steps done, for a message."""
    names = list(_course.open)  # another thread may ask while one ends
    return f'"{names[-1] if names else BETWEEN}" after step {_course.step}'
