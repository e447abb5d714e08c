"""`diffdistill compare`: several methods on one teacher, from one seed, under one budget, in one table.

Each method is an ordinary run in out/<name>, so a comparison that was interrupted goes on where it stopped, and
`sample`, `evaluate` and `export` work on every one of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from diffdistill import config_files
from diffdistill.compare_budget import Budget
from diffdistill.compare_report import Row, write_report
from diffdistill.config import build, call, compose, override
from diffdistill.config_types import did_you_mean
from diffdistill.errors import UserError
from diffdistill.evaluation import harness
from diffdistill.evaluation.harness import Evaluation
from diffdistill.generator import Generator
from diffdistill.launch import card_of, train
from diffdistill.pictures import where
from diffdistill.recipe import Recipe, assemble
from diffdistill.run_folder import RunFolder, read_json, writing
from diffdistill.trainer import NonFiniteError

SCHEMA = 1
SHARED = ("data", "overrides", "seed", "budget")  # what all calls into one folder must agree in


@dataclass(frozen=True)
class Entry:
    """One method of a comparison. words: its overrides of train.  steps, updates: what the budget gives it."""

    name: str
    words: tuple[str, ...]
    steps: int
    updates: int

    def settings(self, out: Path) -> DictConfig:
        """The configuration of its run."""
        every = max(1, self.steps // 10)
        own = (f"trainer.steps={self.steps}", f"trainer.checkpoint_every={every}")
        return compose("train", [*self.words, *own, f"run_dir={out / self.name}", "resume=auto"])


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
    """Train every named method and write out/table.csv, table.md, compare.json and two pictures; returns the status.

    data, data_name: a node of the group data and its name.  budget: a Budget.  overrides: of train, for all.
    Called again with the same `out` it goes on, or adds methods; the table is over all that are finished there.
    Status 1 if a method diverged: the others still run.
    """
    limits: Budget = build(budget)
    common = _common(data, data_name, seed, overrides, limits)
    names = _names(data_name, distillers, common)
    folder = Path(out if out is not None else f"runs/compare-{data_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    shared = {"data": data_name, "overrides": list(overrides), "seed": seed, "budget": asdict(limits)}
    plan = _plan(folder, shared)
    console = Console()
    for name in names:  # every method is checked before the first begins
        _check(compose("train", [*_words(data_name, name), *common, "run_dir=none"]))
    if dry_run:
        console.print("dry run: every method fits, nothing was trained.")
        return 0
    with writing(folder, "out"):
        folder.mkdir(parents=True, exist_ok=True)
        entries = [_entry(folder, plan, shared, name, (*_words(data_name, name), *common), limits) for name in names]
        rows = [_row(entry, folder, console) for entry in entries]
        _keep(folder, shared, plan | {row.name: _failed(row) for row in rows if row.error})
    return _conclude(folder, shared, entries, rows, console)


def _common(data: DictConfig, data_name: str, seed: int, overrides: Sequence[str], limits: Budget) -> tuple[str, ...]:
    """Overrides of train that every method gets: the data's values, the caller's own, batch size and seed."""
    stock = compose("train", [f"data={data_name}", "run_dir=none"]).data
    changed = [override(f"data.{key!s}", data[key]) for key in data if data[key] != stock.get(key)]
    batch = () if limits.batch_size is None else (f"trainer.batch_size={limits.batch_size}",)
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key in ("run_dir", "resume", "dry_run", "experiment", "distiller", "data", "trainer.steps", "trainer.seed"):
            raise UserError("overrides", "must leave what the comparison itself decides", repr(word), "Leave it out.")
    return (*changed, *overrides, *batch, f"trainer.seed={seed}", "evaluation.teacher=none")


def _names(data: str, given: Sequence[str] | None, common: Sequence[str]) -> list[str]:
    known = config_files.groups()["distiller"]
    if given is None:
        return [name for name in known if _makes_generator(data, name, common)]
    if not given:
        raise UserError("distillers", "must name a method", "[]", "Leave it out for all.")
    for name in given:
        if name not in known:
            raise UserError("distillers", "must name options of the group distiller", repr(name),
                            did_you_mean(name, known))  # fmt: skip
        if not _makes_generator(data, name, common):
            fix = "Leave it out."
            raise UserError("distillers", "must make one- or few-step generators", repr(name), fix)
    return list(dict.fromkeys(given))


def _makes_generator(data: str, name: str, common: Sequence[str]) -> bool:
    return isinstance(_recipe(data, name, common).distiller.generator, Generator)


def _recipe(data: str, name: str, common: Sequence[str], device: str = "meta") -> Recipe:
    try:
        return assemble(compose("train", [*_words(data, name), *common, "run_dir=none"]), device)
    except UserError as error:
        raise UserError(f"{name}: {error.key}", error.constraint, error.value, error.fix) from error


def _words(data: str, name: str) -> tuple[str, ...]:
    experiment = f"{data}_{name}"
    if experiment in config_files.groups()["experiment"]:
        return (f"experiment={experiment}",)
    return (f"data={data}", f"distiller={name}", "experiment=none")


def _check(settings: DictConfig) -> None:
    if settings.stages:
        fix = "Compare methods of one stage, or train that experiment on its own."
        raise UserError("distillers", "must not have recipes of several stages: a budget is for one run",
                        list(settings.stages), fix)  # fmt: skip
    node = OmegaConf.merge(settings, {"dry_run": True, "run_dir": "runs/none"})
    with contextlib.redirect_stdout(io.StringIO()):
        call(node, train)  # type: ignore[arg-type]


def _plan(folder: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What earlier calls decided for each method, once it is sure that they compared under the same settings."""
    file = folder / "compare.json"
    if not file.is_file():
        RunFolder(folder).refuse_occupied("out")
        return {}
    stored = read_json(file, "out")
    for key in SHARED:
        if stored.get(key) != shared[key]:
            fix = "Name another folder, or leave the settings as they were."
            raise UserError(key, f"must be {stored.get(key)}, as in the comparison that goes on", shared[key], fix)
    return dict(stored["methods"])


def _entry(
    folder: Path, plan: dict[str, Any], shared: Mapping[str, Any], name: str, words: tuple[str, ...], limits: Budget
) -> Entry:
    """The method's share of the budget; decided once, then read back."""
    if name not in plan:
        steps, updates = limits.steps(compose("train", [*words, "run_dir=none"]))
        plan[name] = {"words": list(words), "steps": steps, "updates": updates}
        _keep(folder, shared, plan)
    found = plan[name]
    if tuple(found["words"]) != words:
        raise UserError("out", f"must hold a comparison whose {name} had the same settings", found["words"],
                        "Name another folder.")  # fmt: skip
    return Entry(name, words, found["steps"], found["updates"])


def _keep(folder: Path, shared: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Add to what is on disk: another process may compare other methods into this folder."""
    file = folder / "compare.json"
    earlier = read_json(file, "out")["methods"] if file.is_file() else {}
    aside = folder / ".compare.json"
    aside.write_text(json.dumps({"schema": SCHEMA, **shared, "methods": {**earlier, **plan}}, indent=1) + "\n")
    aside.replace(file)


def _failed(row: Row) -> dict[str, Any]:
    return {"error": row.error}


def _row(entry: Entry, folder: Path, console: Console) -> Row:
    console.rule(f"{entry.name}: {entry.updates} updates of the student in {entry.steps} steps")
    run = RunFolder(folder / entry.name)
    if not run.is_finished:
        try:
            call(entry.settings(folder), train)
        except NonFiniteError as error:
            console.print(f"{entry.name} diverged: {error}", soft_wrap=True, highlight=False)
            return Row(entry.name, updates=entry.updates, steps=entry.steps, error=str(error))
    return _read(entry, run)


def _read(entry: Entry, run: RunFolder) -> Row:
    summary = read_json(run.path / "summary.json", "out")
    return Row(
        entry.name,
        figures=summary["student"],
        protocol=summary.get("protocol", {}),
        cpu_seconds=summary["cpu_seconds"] + summary.get("pairs", {}).get("cpu_seconds", 0.0),
        peak_bytes=summary["peak_memory_bytes"],
        updates=entry.updates,
        steps=entry.steps,
    )


def _conclude(
    folder: Path, shared: Mapping[str, Any], entries: Sequence[Entry], rows: Sequence[Row], console: Console
) -> int:
    """The report over all methods that are finished in the folder, this call's or an earlier one's."""
    stored = read_json(folder / "compare.json", "out")["methods"]
    own = {row.name: row for row in rows}
    all_rows = []
    for name, found in stored.items():
        run = RunFolder(folder / name)
        if name in own:
            all_rows.append(own[name])
        elif run.is_finished:
            all_rows.append(_read(Entry(name, tuple(found["words"]), found["steps"], found["updates"]), run))
    settings = entries[0].settings(folder)
    with writing(folder, "out"):
        teachers = _teachers(folder, settings, all_rows)
        files = write_report(folder, settings, shared, [*teachers, *all_rows], console)
    console.print("look at next:")
    for file in files:
        console.print(f"  {file}", soft_wrap=True, highlight=False)
    return 1 if any(row.error for row in all_rows) else 0


def _teachers(folder: Path, settings: DictConfig, rows: Sequence[Row]) -> list[Row]:
    """The teacher's own sampler, and its output after one step: what a method has to be better than."""
    judge: Evaluation = build(settings.evaluation)
    if judge.metrics == ():
        return []
    file = folder / "teacher.json"
    if file.is_file():
        return [Row(**row) for row in read_json(file, "out")["rows"]]
    recipe, found = assemble(settings), []
    for start in _starts(folder, recipe, rows):
        once = Generator(recipe.networks["teacher"], (start,))
        figures, _ = harness.evaluate(once, recipe.data, judge, *where(recipe.networks))
        found.append(Row(f"teacher, one step from {start:g}", figures=figures))
    found.insert(0, Row("teacher", figures=_teacher_figures(recipe, settings, judge, set(found[0].figures))))
    file.write_text(json.dumps({"schema": SCHEMA, "rows": [asdict(row) for row in found]}, indent=1) + "\n")
    return found


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
    """From where the teacher takes its one step: t_max, and where the methods begin."""
    process = recipe.networks["teacher"].process
    starts = [process.t_max]
    for row in rows:
        if row.error:
            continue
        config = RunFolder(folder / row.name).read_config("out")
        times = config.distiller.get("times")
        if times and float(times[0]) not in starts:
            starts.append(float(times[0]))
    return [start for start in starts if torch.isfinite(torch.tensor(start))]
