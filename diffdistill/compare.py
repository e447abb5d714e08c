"""`diffdistill compare`: several methods on one teacher, from one seed, under one budget, in one table.

Each method is an ordinary run in out/<name>, so a comparison that was interrupted goes on where it stopped, and
`sample`, `evaluate` and `export` work on every one of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from diffdistill import config_files
from diffdistill.compare_budget import Budget, student_updates
from diffdistill.compare_plan import Plan
from diffdistill.compare_report import Row, write_report
from diffdistill.config import build, call, compose, override
from diffdistill.config_types import did_you_mean
from diffdistill.errors import UserError
from diffdistill.evaluation import harness
from diffdistill.evaluation.harness import Evaluation
from diffdistill.generator import Generator
from diffdistill.launch import card_of, train
from diffdistill.machine import machine
from diffdistill.pictures import where
from diffdistill.recipe import MADE, Recipe, assemble
from diffdistill.report import or_tell, write_compare_report
from diffdistill.run_folder import RunFolder, read_json, writing
from diffdistill.trainer import NonFiniteError

SCHEMA = 1  # of teacher.json
_FREE = {"cpu_seconds": 0.0}
# What the comparison itself decides: an override of these would be replaced in silence.
OWN = (
    "run_dir", "resume", "dry_run", "command", "experiment", "distiller", "data", "stages",
    "trainer.steps", "trainer.seed", "trainer.checkpoint_every", "trainer.cpu_seconds", "evaluation.teacher",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One method of a comparison. words: its overrides of train.  steps, updates: what the budget gives it."""

    name: str
    words: tuple[str, ...]
    steps: int
    updates: int


def compare(
    data: DictConfig,
    data_name: str,
    distillers: list[str] | None,
    budget: DictConfig,
    seed: int,
    overrides: list[str],
    out: str | None,
    dry_run: bool,
) -> int:
    """Train every named method and write report.html, table.csv, table.md, compare.json and two pictures into `out`;
    returns the status.

    data, data_name: a node of the group data and its name.  budget: a Budget.  overrides: of train, for all.
    Called again with the same `out` it goes on, or adds methods; the table is over all that are finished there.
    Status 1 if a method diverged: the others still run.
    """
    limits: Budget = build(budget)
    _refuse_own(overrides, limits)
    changed = _changed(data, data_name)
    common = _common(changed, seed, overrides, limits)
    names = _names(data_name, distillers, common)
    folder = Path(out if out is not None else f"runs/compare-{data_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    plan = Plan(
        folder,
        {"data": " ".join([data_name, *changed]), "overrides": overrides, "seed": seed, "budget": asdict(limits)},
    )
    words = {name: (*_words(data_name, name), *common) for name in names}
    decided = plan.methods()
    for name in names:  # every method is checked before the first begins
        _check(name, _settings(folder, name, words[name], decided.get(name, {}).get("steps")))
    console = Console()
    if dry_run:
        console.print("dry run: every method fits, nothing was trained.")
        return 0
    with writing(folder, "out"):
        folder.mkdir(parents=True, exist_ok=True)
        entries = [_entry(plan, name, words[name], limits) for name in names]
        rows = [_row(entry, plan, console) for entry in entries]
    return _conclude(plan, entries[0], rows, console)


def _refuse_own(overrides: Sequence[str], limits: Budget) -> None:
    own = OWN if limits.batch_size is None else (*OWN, "trainer.batch_size")
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key in own or key.startswith("data."):
            fix = "Give data.* to the comparison." if key.startswith("data.") else "Leave it out."
            raise UserError("overrides", "must leave what the comparison itself decides", repr(word), fix)


def _changed(data: DictConfig, data_name: str) -> list[str]:
    """Overrides of train that give its data the values of the comparison's."""
    stock = compose("train", [f"data={data_name}", "run_dir=none"]).data
    return [override(f"data.{key!s}", data[key]) for key in data if data[key] != stock.get(key)]


def _common(changed: Sequence[str], seed: int, overrides: Sequence[str], limits: Budget) -> tuple[str, ...]:
    """Overrides of train that every method gets. The teacher is measured once, not by every run."""
    batch = () if limits.batch_size is None else (f"trainer.batch_size={limits.batch_size}",)
    seconds = () if limits.seconds is None else (f"trainer.cpu_seconds={limits.seconds}",)
    return (*changed, *overrides, *batch, *seconds, f"trainer.seed={seed}", "evaluation.teacher=none")


def _settings(folder: Path, name: str, words: Sequence[str], steps: int | None) -> DictConfig:
    """The configuration of a method's run; steps: None before the budget was counted."""
    own = [] if steps is None else [f"trainer.steps={steps}", f"trainer.checkpoint_every={max(1, steps // 10)}"]
    return compose("train", [*words, *own, override("run_dir", str(folder / name)), "resume=auto"])


def _names(data: str, given: Sequence[str] | None, common: Sequence[str]) -> list[str]:
    known = config_files.groups()["distiller"]
    if given is None:
        return [name for name in known if _saves_evaluations(data, name, common)]
    if not given:
        raise UserError("distillers", "must name a method", "[]", "Leave it out for all.")
    for name in given:
        if name not in known:
            raise UserError("distillers", "must name options of the group distiller", repr(name),
                            did_you_mean(name, known))  # fmt: skip
        if not _saves_evaluations(data, name, common):
            fix = "Leave it out, or set guidance, num_steps or sampler in overrides."
            raise UserError("distillers", "must sample with fewer evaluations than the teacher", repr(name), fix)
    return list(dict.fromkeys(given))


def _saves_evaluations(data: str, name: str, common: Sequence[str]) -> bool:
    recipe = _recipe(data, name, common)
    return recipe.distiller.generator.nfe < recipe.sampler.nfe


def _recipe(data: str, name: str, common: Sequence[str]) -> Recipe:
    try:
        return assemble(compose("train", [*_words(data, name), *common, "run_dir=none"]), "meta")
    except UserError as error:
        raise _of_method(name, error) from error


def _of_method(name: str, error: UserError) -> UserError:
    """The same error, saying whose configuration it is about."""
    error.args, error.key = (f"{name}: {error}",), f"{name}: {error.key}"
    return error


def _words(data: str, name: str) -> tuple[str, ...]:
    experiment = f"{data}_{name}"
    if experiment in config_files.groups()["experiment"]:
        return (f"experiment={experiment}",)
    return (f"data={data}", f"distiller={name}", "experiment=none")


def _check(name: str, settings: DictConfig) -> None:
    """Run a method dry: it fits data and teacher, and a run that is there already has the same settings."""
    if settings.stages:
        fix = "Compare methods of one stage, or train that experiment on its own."
        raise UserError("distillers", "must not have recipes of several stages, a budget is for one run",
                        f"{name} with {list(settings.stages)}", fix)  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            call(cast("DictConfig", OmegaConf.merge(settings, {"dry_run": True})), train)
    except UserError as error:
        raise _of_method(name, error) from error


def _entry(plan: Plan, name: str, words: tuple[str, ...], limits: Budget) -> Entry:
    """The method's share of the budget; decided once, then read back."""
    found = plan.methods().get(name)
    if found is None:
        steps, updates = limits.steps(compose("train", [*words, "run_dir=none"]))
        decision = {"words": list(words), "steps": steps, "updates": updates, "machine": machine()}
        found = plan.decide(name, decision)
    if tuple(found["words"]) != words:
        raise UserError("out", f"must hold a comparison whose {name} had the same settings", found["words"],
                        "Name another folder.")  # fmt: skip
    return Entry(name, words, found["steps"], found["updates"])


def _row(entry: Entry, plan: Plan, console: Console) -> Row:
    console.rule(f"{entry.name}: {entry.updates} updates of the student in {entry.steps} steps")
    try:  # a finished run is passed over, once its settings are known to be the same
        call(_settings(plan.folder, entry.name, entry.words, entry.steps), train)
    except NonFiniteError as error:
        console.print(f"{entry.name} diverged: {error}", soft_wrap=True, highlight=False)
        plan.note(entry.name, str(error))
        return Row(entry.name, updates=entry.updates, steps=entry.steps, error=str(error))
    plan.note(entry.name, None)
    return _read(entry, RunFolder(plan.folder / entry.name))


def _read(entry: Entry, run: RunFolder) -> Row:
    summary = read_json(run.path / "summary.json", "out")
    steps, updates = summary["iterations"], entry.updates
    if steps < entry.steps:  # by the limit on seconds
        updates = student_updates(assemble(run.read_config("out"), "meta").distiller, steps)
    return Row(
        entry.name,
        figures=summary["student"],
        protocol=summary.get("protocol", {}),
        cpu_seconds=summary["cpu_seconds"] + sum(summary.get(key, _FREE)["cpu_seconds"] for key in MADE.values()),
        peak_bytes=summary["peak_memory_bytes"],
        updates=updates,
        steps=steps,
    )


def _conclude(plan: Plan, first: Entry, rows: Sequence[Row], console: Console) -> int:
    """The report over all methods that ended in the folder, in this call or an earlier one, here or elsewhere."""
    folder, own = plan.folder, {row.name: row for row in rows}
    all_rows = []
    for name, found in plan.methods().items():
        run, steps, updates = RunFolder(folder / name), found["steps"], found["updates"]
        if name in own:
            all_rows.append(own[name])
        elif run.is_finished:
            all_rows.append(_read(Entry(name, tuple(found["words"]), steps, updates), run))
        elif found.get("error"):
            all_rows.append(Row(name, updates=updates, steps=steps, error=found["error"]))
    settings = _with_plain_teacher(_settings(folder, first.name, first.words, first.steps), plan)
    with writing(folder, "out"):
        teachers = _teachers(folder, settings, all_rows)
        files = write_report(folder, settings, plan.shared, [*teachers, *all_rows], console)
        with or_tell(folder):
            write_compare_report(folder)
    console.print("look at next:")
    for file in (folder / "report.html", *files):
        console.print(f"  {file}", soft_wrap=True, highlight=False)
    return 1 if any(row.error for row in all_rows) else 0


def _with_plain_teacher(settings: DictConfig, plan: Plan) -> DictConfig:
    """The settings under the guidance that the comparison itself asks for, not under that of one method's recipe.

    Else the teacher's row would depend on which method was named first.
    """
    asked = [word for word in plan.shared["overrides"] if word.lstrip("+~").startswith("guidance")]
    stock = compose("train", [f"data={plan.shared['data'].split()[0]}", *asked, "run_dir=none"])
    return cast("DictConfig", OmegaConf.merge(settings, {"guidance": stock.guidance}))


def _teachers(folder: Path, settings: DictConfig, rows: Sequence[Row]) -> list[Row]:
    """The teacher's own sampler, and its output after one step: what a method has to be better than.

    What earlier calls measured is read back.
    """
    judge: Evaluation = build(settings.evaluation)
    if judge.metrics == ():
        return []
    file, recipe = folder / "teacher.json", assemble(settings)
    found = {row["name"]: Row(**row) for row in read_json(file, "out")["rows"]} if file.is_file() else {}
    starts = {f"teacher, one step from {start:g}": start for start in _starts(folder, recipe, rows)}
    for name in [name for name in starts if name not in found]:
        once = Generator(recipe.networks["teacher"], (starts[name],))
        found[name] = Row(name, figures=harness.evaluate(once, recipe.data, judge, *where(recipe.networks))[0])
    if "teacher" not in found:
        wanted = set(found[next(iter(starts))].figures)
        found["teacher"] = Row("teacher", figures=_teacher_figures(recipe, settings, judge, wanted))
    aside = file.with_name(f".teacher.{os.getpid()}.json")  # two processes may conclude at once
    aside.write_text(json.dumps({"schema": SCHEMA, "rows": [asdict(row) for row in found.values()]}, indent=1) + "\n")
    aside.replace(file)
    return [found["teacher"], *(found[name] for name in starts)]


def _teacher_figures(recipe: Recipe, settings: DictConfig, judge: Evaluation, wanted: set[str]) -> dict[str, Any]:
    """From the card of the shipped weights, or measured where there is none of this protocol with these figures."""
    try:
        found = harness.read_card(*card_of(settings.networks), judge, recipe.data, recipe.sampler.nfe)
    except UserError:
        found = {}
    if wanted <= found.keys():
        return found
    return harness.evaluate(recipe.sampler, recipe.data, judge, *where(recipe.networks))[0]


def _starts(folder: Path, recipe: Recipe, rows: Sequence[Row]) -> list[float]:
    """From where the teacher takes its one step: t_max, and where the methods begin; the highest first."""
    starts = {recipe.networks["teacher"].process.t_max}
    for row in rows:
        if not row.error:
            made = assemble(RunFolder(folder / row.name).read_config("out"), "meta").distiller.generator
            starts |= {made.times[0]} if isinstance(made, Generator) else set()
    return sorted(starts, reverse=True)
