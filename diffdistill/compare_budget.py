"""What a comparison spends on each method, and how many steps of it that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from diffdistill.cached_tensors import sources
from diffdistill.config import build
from diffdistill.distillers.base import Distiller
from diffdistill.errors import UserError
from diffdistill.recipe import assemble
from diffdistill.trainer import Trainer

MARGIN = 0.95  # of the seconds: the price of a step is an estimate; what is dearer in the end is cut off by Trainer
LONGEST = 1_000_000  # steps searched for the student's updates
TIMED = 64  # pairs or trajectories that are made to price them


@dataclass(frozen=True)
class Budget:
    """iterations: updates of the student.  seconds: CPU seconds of the training process, with what making
    pairs or trajectories costs.
    At least one of the two.  batch_size: of every method, None is each one's own.
    """

    iterations: int | None
    seconds: float | None
    batch_size: int | None

    def __post_init__(self) -> None:
        if self.iterations is None and self.seconds is None:
            fix = "Write budget.iterations=400 or budget.seconds=120."
            raise UserError("iterations, seconds", "must not both be null", "null", fix)
        for name in ("iterations", "seconds", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(name, "must be > 0, or null", value, "Raise it.")

    def steps(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """(steps of the trainer, student updates in them) for a method under this budget.

        Under `seconds` a few steps are taken and timed first; the answer then depends on the machine.
        """
        recipe = assemble(settings, "meta")
        steps = LONGEST if self.iterations is None else _steps_for(recipe.distiller, self.iterations)
        if self.seconds is not None:
            price, once = _prices(settings)
            affordable = int(MARGIN * (self.seconds - once) / price)
            if affordable < 1:
                fix = f"What the teacher makes takes {once:.1f} s, a step {price:.2f} s: raise it."
                raise UserError("budget.seconds", "must pay for one step", self.seconds, fix)
            steps = min(steps, affordable)
        updates = student_updates(recipe.distiller, steps)
        if not updates:
            raise UserError("budget", "must pay for one update of the student", f"{steps} steps", "Raise it.")
        return steps, updates


def student_updates(distiller: Distiller, steps: int) -> int:
    """In the first `steps` steps."""
    return sum(_updates_student(distiller, step) for step in range(steps))


def _updates_student(distiller: Distiller, step: int) -> bool:
    return any("student" in phase.trains for phase in distiller.phases(step))


def _steps_for(distiller: Distiller, updates: int) -> int:
    """The fewest steps in which the student is updated that often."""
    found = 0
    for step in range(LONGEST):
        found += _updates_student(distiller, step)
        if found == updates:
            return step + 1
    raise UserError("budget.iterations", f"must be reached within {LONGEST} steps", updates, "Lower it.")


def _prices(settings: Mapping[str, Any]) -> tuple[float, float]:
    """CPU seconds of a step, mean over a cycle of phases, and of what comes before the first."""
    recipe = assemble(settings)
    trainer: Trainer = build(settings["trainer"])
    once = 0.0
    for source in sources(recipe, settings).values():
        few: Any = replace(source, num=min(source.num, TIMED))  # type: ignore[type-var]
        few.make(recipe)  # the first call allocates
        made = few.make(recipe)
        once += made.cpu_seconds * source.num / few.num
        recipe = made.join(recipe)
    first = next(step for step in range(LONGEST) if _updates_student(recipe.distiller, step))
    second = next(step for step in range(first + 1, LONGEST) if _updates_student(recipe.distiller, step))
    cycle = range(first, second)
    optimizers, accelerator = trainer.prepare(recipe.networks), Accelerator()

    def run() -> float:
        started = time.process_time()
        for step in cycle:
            batches = trainer.batches(recipe.data, recipe.needs, recipe.networks, step)
            for phase in recipe.distiller.phases(step):
                trainer.update(phase, batches, step, recipe.networks, optimizers, accelerator)
        return time.process_time() - started

    for _ in range(2):
        run()
    timed: list[float] = []
    while len(timed) < 5 or (sum(timed) < 3 and len(timed) < 200):
        timed.append(run())
    return statistics.median(timed) / len(cycle), once
