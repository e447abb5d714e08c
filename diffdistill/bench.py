"""`diffdistill bench step`: a training step against the sum of its network passes, updates and arithmetic.

Interleaved in one process, on one thread, by CPU clock (on a GPU by the wall's): every round times the steps of a
cycle, each part of them alone, and the steps once more. The last against the first is the null ratio: if it leaves .98
to 1.02 the machine is too noisy to tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from diffdistill import config_files
from diffdistill.bench_plain import WORDS as PLAIN
from diffdistill.bench_plot import plot_steps
from diffdistill.bench_step import measured
from diffdistill.compiling import check_compile
from diffdistill.config import compose
from diffdistill.config_types import did_you_mean
from diffdistill.errors import UserError, require_at_least
from diffdistill.evaluation.plots import check_picture
from diffdistill.launch import accelerator_of
from diffdistill.machine import machine, versions
from diffdistill.memory import freed_is_kept
from diffdistill.recipe import assemble
from diffdistill.run_folder import new_file, writing

SCHEMA = 3
NOISY = 3
QUICK = {"pairs": 8, "batch_size": 8}
WITHOUT_DATA = "noise"  # the data of networks that have none of their own
WIDE = 120  # columns of a file or pipe, which the last table needs
FEW = 2  # samples of a batch where networks are large


@dataclass(frozen=True)
class Pair:
    """A method on a network. words: overrides of train."""

    distiller: str
    networks: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.distiller} on {self.networks}"

    def settings(self, *more: str) -> DictConfig:
        return compose("train", [*self.words, "run_dir=none", *more])


def arguments(words: Sequence[str]) -> list[str]:
    """The words of the command line: networks=... is Hydra's word for a group, the key of this verb is teachers."""
    return ["teachers=" + word.removeprefix("networks=") if word.startswith("networks=") else word for word in words]


def step(
    distillers: list[str] | Literal["all"],
    teachers: list[str],
    pairs: int,
    batch_size: int | None,
    overrides: list[str],
    device: Literal["cpu", "cuda"],
    quick: bool,
    out: str | None,
    plot: str | None,
) -> int:
    """Bench every distiller on every teacher; prints a table each and the verdict last. Returns the exit status.

    distillers: all leaves out those that a teacher does not fit, and says why.  teachers: options of the group
    networks.  pairs: interleaved rounds.  batch_size: None is the recipe's own, 2 where networks have no data of
    their own.  overrides: of train, for all.  quick: fewer rounds of a smaller batch, done within 50 s.
    out: JSON file.  plot: picture.
    """
    if pairs < 2:
        raise UserError("pairs", "must be >= 2", pairs, "40 is a good number.")
    require_at_least(1, batch_size=1 if batch_size is None else batch_size)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "must be one that torch finds here", device, "Set device=cpu.")
    if out is not None:
        new_file("out", out)
    if plot is not None:
        check_picture(plot, "plot")
        new_file("plot", plot)
    own = QUICK["batch_size"] if quick and batch_size is None else batch_size
    todo, left_out = _fitting(distillers, teachers, own, overrides)
    console, threads = Console(), torch.get_num_threads()
    if not console.is_terminal:
        console = Console(width=WIDE)
    for text in left_out:
        console.print(f"left out: {text['distiller']} on {text['networks']}: {text['why']}", highlight=False)
    torch.set_num_threads(1 if device == "cpu" else threads)
    results = []
    try:
        for pair in todo:
            with freed_is_kept(device):  # as in training
                results.append(_one(pair, QUICK["pairs"] if quick else pairs, device))
            console.print(_table(results[-1]))
            if out is not None:  # after each: hours of measuring are not lost
                _write(out, results, left_out, device)
    finally:
        torch.set_num_threads(threads)
    if plot is not None:
        with writing(plot, "plot", "Name another place, or make room."):
            plot_steps(results, plot)
    return _verdict(results, console)


def _fitting(
    distillers: Sequence[str] | Literal["all"],
    teachers: Sequence[str],
    batch_size: int | None,
    overrides: Sequence[str],
) -> tuple[list[Pair], list[dict[str, str]]]:
    """The pairs to bench, each built without weights before any is timed; and those of `all` that do not fit."""
    groups = config_files.groups()
    asked = groups["distiller"] if distillers == "all" else distillers
    for key, names, group in (("distillers", asked, "distiller"), ("teachers", teachers, "networks")):
        known = groups[group]
        if not names or (unknown := [name for name in names if name not in known]):
            fix = did_you_mean(unknown[0], known) if names else f"Write '{key}=[{known[0]}]'."
            raise UserError(key, f"must name options of the group {group}", names, fix)
    todo, left_out = [], []
    for networks in teachers:
        for name in asked:
            pair = Pair(name, networks, tuple(_words(name, networks, batch_size, overrides)))
            try:
                assemble(pair.settings(), "meta")
            except UserError as error:
                if distillers != "all" or overrides:
                    error.args = (f"{pair.name}: {error}",)
                    raise
                left_out.append({"distiller": name, "networks": networks, "why": str(error)})
            else:
                todo.append(pair)
    if not todo:
        why = left_out[0]["why"]
        raise UserError("teachers", "must be trainable by some method", list(teachers), f"Choose another one: {why}")
    return todo, left_out


def _words(distiller: str, networks: str, batch_size: int | None, overrides: Sequence[str]) -> Iterator[str]:
    """Overrides of train: the experiment of that name where there is one, else the method's own values."""
    groups = config_files.groups()
    data = max((name for name in groups["data"] if networks.startswith(name)), key=len, default=WITHOUT_DATA)
    if f"{data}_{distiller}" in groups["experiment"]:
        yield f"experiment={data}_{distiller}"
    else:
        yield from ("experiment=none", f"data={data}", f"distiller={distiller}")
    yield from (f"networks={networks}", "evaluation=none", "stages={}", "init={}")
    if batch_size is not None or data == WITHOUT_DATA:
        yield f"trainer.batch_size={batch_size or FEW}"
    yield from overrides


def _one(pair: Pair, rounds: int, device: str) -> dict[str, Any]:
    settings = pair.settings()
    accelerator: Accelerator = accelerator_of(settings["precision"], cpu=device == "cpu")
    check_compile(settings["compile"], accelerator.device)
    found = measured(settings, pair.settings(*PLAIN), accelerator, rounds, settings["compile"])
    return {"distiller": pair.distiller, "networks": pair.networks, "words": list(pair.words), **found}


def _write(out: str, results: Sequence[dict[str, Any]], left_out: Sequence[dict[str, str]], device: str) -> None:
    report = {
        "schema": SCHEMA,
        "machine": {**machine(), "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"},
        "versions": versions(),
        "results": list(results),
        "left_out": list(left_out),
    }
    with writing(out, "out", "Name another place, or make room."):
        Path(out).write_text(json.dumps(report, indent=1) + "\n")


def _verdict(results: Sequence[dict[str, Any]], console: Console) -> int:
    if len(results) > 1:
        console.print(_overview(results))
    noisy = [r for r in results if not 0.98 <= r["null_ratio"] <= 1.02]
    worst = max(results, key=lambda r: r["ratio"])
    if noisy:
        which = max(noisy, key=lambda r: abs(r["null_ratio"] - 1))
        console.print(
            f"verdict: too noisy to tell: null ratio {which['null_ratio']:.3f} of {which['distiller']} on "
            f"{which['networks']} is outside .98 to 1.02, {len(noisy)} of {len(results)} are",
            soft_wrap=True,
        )
        return NOISY
    console.print(
        f"verdict: a step costs at most {worst['ratio']:.3f} times the sum of its parts, "
        f"{worst['distiller']} on {worst['networks']}",
        soft_wrap=True,
    )
    return 0


def _table(result: dict[str, Any]) -> Table:
    title = (
        f"{result['distiller']} on {result['networks']} ({result['parameters'] / 1e6:.2f} M), batch "
        f"{result['batch_size']}, cycle of {result['steps_in_cycle']} step(s), {result['pairs']} pairs"
    )
    table = Table("part", "count", "ms per cycle", "of it backward", title=title)
    for part in result["parts"]:
        lost = f" ({part['graphs_without_gradient']} graphs in vain)" if part["graphs_without_gradient"] else ""
        back = part["backward_milliseconds"]
        table.add_row(
            part["name"] + lost, str(part["count"]), f"{part['milliseconds']:.2f}", f"{back:.2f}" if back else ""
        )
    table.add_section()
    for name, key in (
        ("the passes", "passes_milliseconds"),
        ("sum of all parts", "sum_milliseconds"),
        ("the steps", "step_milliseconds"),
    ):
        table.add_row(name, "", f"{result[key]:.2f}", "")
    table.add_section()
    for name, key in RATIOS.items():
        table.add_row(name, "", f"{result[key]:.3f}", "")
    table.add_row("steps per second", "", f"{result['steps_per_second']:.1f}", "")
    if result["speed_up"] is not None:
        table.add_row("the plain loop", "", f"{result['plain_milliseconds']:.2f}", "")
        table.add_row("plain loop / steps", "", f"{result['speed_up']:.3f}", "")
    table.add_row("peak live MiB", "", f"{result['peak_bytes'] / 2**20:.1f}", "")
    table.add_row("over the fewest", "", f"{result['ratio_of_bytes']:.3f}", "")
    return table


RATIOS = {
    "steps / sum": "ratio",
    "steps / passes and updates": "ratio_to_passes_and_updates",
    "steps / passes": "ratio_to_passes",
    "null ratio": "null_ratio",
}


def _overview(results: Sequence[dict[str, Any]]) -> Table:
    title = (
        "steps over the sum of their parts, over passes and updates (p+u), over passes; the plain loop over steps; "
        "peak live bytes over the fewest"
    )
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("distiller", "networks", "sum", "p+u", "passes", "null", "plain", "steps/s", "MiB", "bytes"):
        table.add_column(name, no_wrap=True)
    for r in results:
        ratios = (f"{r[key]:.3f}" for key in RATIOS.values())
        plain = "" if r["speed_up"] is None else f"{r['speed_up']:.2f}"
        mib = f"{r['peak_bytes'] / 2**20:.1f}"
        speed, bytes_ = f"{r['steps_per_second']:.1f}", f"{r['ratio_of_bytes']:.2f}"
        table.add_row(r["distiller"], r["networks"], *ratios, plain, speed, mib, bytes_)
    return table
