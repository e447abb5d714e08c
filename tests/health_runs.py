"""Runs watched for their health: as shipped, or made sick on purpose.

    python tests/health_runs.py --steps 700 --every 100 gmm2d_dmd2 gmm2d_dmd2:frozen ...

prints one row of a table per run: its figures and alarms. Without names, every short experiment
that is shipped is run as it is, and each sickness. What was measured is kept by `--keep FILE` and judged again, without
training, by `--judge FILE`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffdistill import config_files
from diffdistill.cached_tensors import sources
from diffdistill.config import build, compose
from diffdistill.distillers.base import Batch, Loss, Phase
from diffdistill.errors import UserError
from diffdistill.evaluation.course import Course, Verdict
from diffdistill.evaluation.health import judge
from diffdistill.evaluation.vitals import Health, Vitals
from diffdistill.recipe import Recipe, assemble
from diffdistill.trainer import Progress
from diffdistill.training_state import TrainingState

# What a sickness changes in the configuration, beside what `made_sick` does to the run.
WORDS: dict[str, tuple[str, ...]] = {
    "well": (),
    "frozen": (),  # the critic's learning rate is 0
    "sign": (),  # the student climbs its loss
    "lr": (),  # every learning rate times 100
    "labels": (),  # the data's labels are one too high
    "critic times": ("distiller.critic_law.low=0.0", "distiller.critic_law.high=0.2"),
    "student times": ("distiller.student_law.low=0.0", "distiller.student_law.high=0.1"),
    "gan": ("distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1"),
    "paper's gan x 1000": ("distiller.gan_weight=3", "distiller.critic_gan_weight=0.01"),
    "gan x 1000": ("distiller.gan_weight=100", "distiller.critic_gan_weight=0.1"),
}
# The sign that has to tell of it.
TOLD = {
    "frozen": "critic lag",
    "sign": "direction",
    "lr": "step size",
    "labels": "labels",
    "critic times": "time range",
    "student times": "time range",
    "gan x 1000": "term balance",
}
FIGURES = {  # of the second half
    "mean": "sample/mean", "std": "sample/std", "saturated": "sample/saturated",
    "spread": "sample/spread", "condition": "condition/student",
}  # fmt: skip


def watched(words: Sequence[str], every: int, sickness: str = "well") -> tuple[Course, TrainingState, float]:
    """The course of a run as far as it came, its end, and the seconds that watching took."""
    cfg = compose("train", [*words, *WORDS[sickness], "run_dir=none"])
    settings = {str(key): cfg[key] for key in cfg}
    recipe, trainer = assemble(settings), build(settings["trainer"])
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(recipe, settings).values():
            recipe = source.prepare(recipe, settings, Path(folder)).join(recipe)
    recipe = made_sick(recipe, sickness)
    accelerator = Accelerator()
    state = trainer.start(recipe.distiller, recipe.networks)
    for role, optimizer in state.optimizers.items():
        for group in optimizer.param_groups:
            group["initial_lr"] *= rate_of(sickness, role)
    vitals = Vitals(Health(every=every), recipe, trainer.batch_size, accelerator.autocast)
    lines: list[dict[str, Any]] = []

    def after(step: int) -> None:
        if figures := vitals.after(state):
            lines.append({"step": step, **figures})

    progress = Progress(
        lambda step, figures: None, nothing, nothing, before=lambda step: vitals.before(state), after=after
    )
    try:
        trainer.fit(state, recipe.data, recipe.needs, accelerator, progress)
    except UserError as error:
        lines.append({"step": state.step + 1, "failed": str(error)})
    seconds = sum(line.get("time/health_seconds", 0.0) for line in lines)
    return Course(lines, trainer.steps), state, seconds


def nothing(step: int) -> None:
    pass


def rate_of(sickness: str, role: str) -> float:
    """Factor on a role's learning rate."""
    if sickness == "frozen":
        return float(role == "student")
    return 100.0 if sickness == "lr" else 1.0


def made_sick(recipe: Recipe, sickness: str) -> Recipe:
    """The recipe with what no configuration can do to it."""
    if sickness == "sign":
        phases = recipe.distiller.phases
        recipe.distiller.phases = lambda step: [climbing(phase) for phase in phases(step)]  # type: ignore[method-assign]
    return replace(recipe, data=Mislabelled(recipe.data)) if sickness == "labels" else recipe


def climbing(phase: Phase) -> Phase:
    """A student's phase with the sign of its loss flipped."""

    def loss(batch: Batch, rng: Any) -> Loss:
        found = phase.loss(batch, rng)
        return Loss({name: -term for name, term in found.terms.items()}, found.stats)

    return replace(phase, loss=loss) if "student" in phase.trains else phase


class Mislabelled:
    """Data whose labels are one too high."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def batch(self, *args: Any) -> Batch:
        batch: Batch = self._data.batch(*args)
        cond = {key: (value + 1) % self._data.num_classes for key, value in batch.cond.items()}
        return batch if batch.x0 is None else replace(batch, cond=cond)


def alarms(course: Course) -> list[Verdict]:
    return [verdict for verdict in judge(course) if verdict.state == "alarm"]


def row(name: str, course: Course) -> str:
    """The figures of a run and its alarms, a line of a table."""
    late = Course([line for line in course.lines if line["step"] >= course.steps / 2], course.steps)
    moved = [v for key in course.keys("health/update/") for _, v in course.series(f"health/update/{key}")]
    told = ", ".join(f"{verdict.name} ({verdict.step})" for verdict in alarms(course)) or "none"
    whole = [largest(moved), largest(values(course, "average/student")), balance(late)]
    whole += [ends(values(late, "lag/fake_score")), largest(values(course, "sample/distance"))]
    cells = [name, str(course.step), *whole, *(ends(values(late, key)) for key in FIGURES.values()), told]
    return "| " + " | ".join(cells) + " |"


def values(course: Course, key: str) -> list[float]:
    return [value for _, value in course.series(f"health/{key}")]


def largest(values: list[float]) -> str:
    return f"{max(values):.2g}" if values else ""


def ends(values: list[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}" if values else ""


def balance(course: Course) -> str:
    """Largest quotient of a later term's gradient and the first's, at the student."""
    terms = course.keys("health/term/student/")
    if len(terms) < 2:
        return ""
    first, *others = ([v for _, v in course.series(f"health/term/student/{term}")] for term in terms)
    found = [max(a / b for a, b in zip(other, first, strict=True) if b) for other in others if any(first)]
    return f"{max(found):.2g}" if found else ""


def title() -> str:
    whole = ["largest update", "average", "terms", "critic lag", "distance at most"]
    names = ["run", "steps", *whole, *FIGURES, "alarms (step)"]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def keep(path: Path, name: str, course: Course) -> None:
    """Add a run to those kept in a file."""
    with path.open("a") as file:
        file.write(json.dumps({"run": name, "steps": course.steps, "lines": list(course.lines)}) + "\n")


def kept(path: Path) -> Iterator[tuple[str, Course]]:
    """The runs of a file and their courses."""
    for line in path.read_text().splitlines():
        run = json.loads(line)
        yield run["run"], Course(run["lines"], run["steps"])


def shipped() -> Iterator[str]:
    """Experiments that this machine can run."""
    for name in config_files.groups()["experiment"]:
        if name.startswith(("gmm2d_", "digits_")):
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="EXPERIMENT or EXPERIMENT:SICKNESS")
    parser.add_argument("--steps", type=int, help="of each run; the experiment's own unless given")
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="add what was measured to this file, a run in a line")
    parser.add_argument("--judge", type=Path, nargs="+", help="judge the runs that such files keep, and run none")
    given = parser.parse_args()
    print(title(), flush=True)
    for file in given.judge or []:
        for name, course in kept(file):
            print(row(name, course))
    if given.judge:
        return
    for name in given.runs or [*shipped(), *(f"gmm2d_dmd2:{sickness}" for sickness in TOLD)]:
        experiment, _, sickness = name.partition(":")
        for seed in range(given.seeds):
            words = [f"experiment={experiment}", f"trainer.seed={seed}", "stages={}", "init={}"]
            words += [f"trainer.steps={given.steps}"] if given.steps else []
            course, _, _ = watched(words, given.every, sickness or "well")
            shown = f"{name}, seed {seed}" if given.seeds > 1 else name
            if given.keep:
                keep(given.keep, shown, course)
            print(row(shown, course), flush=True)


if __name__ == "__main__":
    main()
