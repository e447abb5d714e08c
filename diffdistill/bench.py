"""`diffdistill bench step`: a training step against the sum of its network passes.

Interleaved in one process, on one thread, by CPU clock: every round times the step, each of its passes alone, its
updates, and the step once more. The last against the first is the null ratio: if it leaves .98 to 1.02 the machine is
too noisy to tell.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from diffdistill import config_files
from diffdistill.config import build, compose
from diffdistill.config_types import did_you_mean
from diffdistill.distillers.base import Phase
from diffdistill.errors import UserError
from diffdistill.machine import machine
from diffdistill.networks.call import Pass, recorded_passes
from diffdistill.recipe import Recipe, assemble
from diffdistill.run_folder import new_file
from diffdistill.trainer import Trainer

SCHEMA = 1
NOISY = 3
QUICK = {"pairs": 24, "batch_size": 8}


@dataclass(frozen=True)
class Item:
    """One line of the list. milliseconds: per cycle, median over rounds."""

    name: str
    count: int
    milliseconds: float


def step(distillers: list[str], teachers: list[str], pairs: int, quick: bool, out: str | None) -> int:
    """Bench every distiller on every teacher; prints a table each and the verdict last. Returns the exit status.

    pairs: interleaved rounds.  quick: fewer rounds of a smaller batch, done within 50 s.  out: JSON file.
    """
    if pairs < 2:
        raise UserError("pairs", "must be >= 2", pairs, "40 is a good number.")
    if out is not None:
        new_file("out", out)
    for key, names, group in (("distillers", distillers, "distiller"), ("teachers", teachers, "networks")):
        known = config_files.groups()[group]
        if not names or (unknown := [name for name in names if name not in known]):
            fix = did_you_mean(unknown[0], known) if names else f"Write '{key}=[{known[0]}]'."
            raise UserError(key, f"must name options of the group {group}", names, fix)
    for teacher in teachers:
        for distiller in distillers:  # a pair that does not fit is told before any is timed
            assemble(_settings(distiller, teacher, quick), "meta")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results, console = [], Console()
    try:
        for teacher in teachers:
            for distiller in distillers:
                results.append(_one(distiller, teacher, QUICK["pairs"] if quick else pairs, quick))
                console.print(_table(results[-1]))
    finally:
        torch.set_num_threads(threads)
    noisy = [r for r in results if not 0.98 <= r["null_ratio"] <= 1.02]
    if out is not None:
        Path(out).write_text(
            json.dumps({"schema": SCHEMA, "machine": {**machine(), "threads": 1}, "results": results}, indent=1) + "\n"
        )
    worst = max(r["ratio"] for r in results)
    if noisy:
        console.print(f"verdict: too noisy to tell (null ratio {noisy[0]['null_ratio']:.3f} is outside .98 to 1.02)")
        return NOISY
    console.print(f"verdict: a step costs at most {worst:.3f} times the sum of its parts")
    return 0


def _one(distiller: str, teacher: str, pairs: int, quick: bool) -> dict[str, Any]:
    settings = _settings(distiller, teacher, quick)
    recipe, trainer = assemble(settings), build(settings.trainer)
    bench = _Bench(recipe, trainer)
    cycle = period(recipe.distiller.phases)
    for warm in range(cycle):
        bench.run_step(warm)
    passes = bench.passes(cycle)
    timed: dict[str, list[float]] = {name: [] for name in ("step", "null", "updates", *passes)}
    for _ in range(pairs):
        timed["step"].append(_clock(lambda: bench.cycle(cycle)))
        for name, (_, replay) in passes.items():
            timed[name].append(_clock(replay))
        timed["updates"].append(_clock(lambda: bench.updates(cycle)))
        timed["null"].append(_clock(lambda: bench.cycle(cycle)))
    parts = [Item(name, count, _median(timed[name]) * count) for name, (count, _) in passes.items()]
    parts.append(Item("updates (optimizer, clip, EMA)", 1, _median(timed["updates"])))
    total, whole = sum(part.milliseconds for part in parts), _median(timed["step"])
    null = statistics.median(b / a for a, b in zip(timed["step"], timed["null"], strict=True))
    return {
        "distiller": distiller,
        "teacher": teacher,
        "batch_size": trainer.batch_size,
        "steps_in_cycle": cycle,
        "pairs": pairs,
        "parts": [asdict(part) for part in parts],
        "rest_milliseconds": whole - total,
        "sum_milliseconds": total,
        "step_milliseconds": whole,
        "ratio": whole / total,
        "null_ratio": null,
    }


def _settings(distiller: str, teacher: str, quick: bool) -> DictConfig:
    overrides = ["experiment=none", f"networks={teacher}", f"distiller={distiller}", "evaluation=none", "run_dir=none"]
    if quick:
        overrides.append(f"trainer.batch_size={QUICK['batch_size']}")
    return compose("train", [f"data={_data_of(teacher)}", *overrides])


class _Bench:
    """The trainer's own update on a recipe, and each of its parts alone."""

    def __init__(self, recipe: Recipe, trainer: Trainer) -> None:
        self.recipe, self.trainer = recipe, trainer
        self.networks, self.accelerator = recipe.networks, Accelerator()
        self.optimizers = trainer.prepare(recipe.networks)

    def run_step(self, index: int) -> None:
        batches = self.trainer.batches(self.recipe.data, self.recipe.needs, self.networks, index)
        for phase in self.recipe.distiller.phases(index):
            self.trainer.update(phase, batches, index, self.networks, self.optimizers, self.accelerator)

    def cycle(self, length: int) -> None:
        for index in range(length):
            self.run_step(index)

    def passes(self, length: int) -> dict[str, tuple[int, Callable[[], None]]]:
        """Name -> (count in a cycle, replay) of each distinct pass."""
        found: dict[str, tuple[int, Callable[[], None]]] = {}
        for index in range(length):
            batches = self.trainer.batches(self.recipe.data, self.recipe.needs, self.networks, index)
            for phase in self.recipe.distiller.phases(index):
                with recorded_passes() as noted:
                    self.trainer.update(phase, batches, index, self.networks, self.optimizers, self.accelerator)
                for done in noted:
                    name = _name(phase, done)
                    found[name] = (found.get(name, (0, None))[0] + 1, self._replay(phase, done, batches[0].cond))
        return found

    def _replay(self, phase: Phase, done: Pass, cond: Any) -> Callable[[], None]:
        view, networks = self.networks[done.role], self.networks
        x = torch.randn(done.batch, *networks.shape, dtype=networks.dtype).requires_grad_(done.through_input)
        t = torch.full((done.batch,), view.process.t_max / 2)

        def replay() -> None:
            networks.train_only(phase.trains if done.backward else ())
            with torch.set_grad_enabled(done.backward):
                plain = view.guided(None) if hasattr(view, "guided") else view
                outputs = [plain(x, t, cond)] if done.layers is None else plain.features(x, t, cond, done.layers)
                if done.backward:
                    torch.autograd.backward([o.mean() for o in outputs])
            networks.zero_grad()
            x.grad = None

        return replay

    def updates(self, length: int) -> None:
        for index in range(length):
            for phase in self.recipe.distiller.phases(index):
                self.networks.train_only(phase.trains)
                for role in phase.trains:
                    for weight in self.networks.weights(role):
                        weight.grad = torch.zeros_like(weight)
                    self.trainer.step(role, index, self.networks, self.optimizers[role])
                self.networks.update_ema(phase.trains)
                self.networks.zero_grad()


def _name(phase: Phase, done: Pass) -> str:
    what = "features" if done.layers is not None else "forward"
    through = " + backward" + (" through its input" if done.through_input else "") if done.backward else ""
    return f"{phase.name}: {done.role} {what}{through}, batch {done.batch}"


def period(phases: Callable[[int], Sequence[Phase]], horizon: int = 40) -> int:
    """The number of steps after which the phases repeat."""
    names = [tuple(phase.name for phase in phases(index)) for index in range(2 * horizon)]
    return next(p for p in range(1, horizon + 1) if names[: 2 * horizon - p] == names[p:])


def _clock(function: Callable[[], None]) -> float:
    started = time.process_time()
    function()
    return 1000 * (time.process_time() - started)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _data_of(teacher: str) -> str:
    return teacher.split("_")[0]


def _table(result: dict[str, Any]) -> Table:
    title = (
        f"{result['distiller']} on {result['teacher']}, batch {result['batch_size']}, "
        f"cycle of {result['steps_in_cycle']} step(s), {result['pairs']} pairs"
    )
    table = Table("part", "count", "ms per cycle", title=title)
    for part in result["parts"]:
        table.add_row(part["name"], str(part["count"]), f"{part['milliseconds']:.2f}")
    table.add_row("sum of the parts", "", f"{result['sum_milliseconds']:.2f}")
    table.add_row("the step", "", f"{result['step_milliseconds']:.2f}")
    table.add_row("left for noise and loss arithmetic", "", f"{result['rest_milliseconds']:.2f}")
    table.add_row("ratio step / sum", "", f"{result['ratio']:.3f}")
    table.add_row("null ratio", "", f"{result['null_ratio']:.3f}")
    return table
