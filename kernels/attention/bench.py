"""`diffdistill bench attention`: block-sparse attention against the machine's ceiling and what torch offers.

The ceiling comes first: multiply-adds on registers alone, by this thread's CPU clock. Every round measures it again and
runs each contestant once, on one thread, by the same clock; medians over rounds are compared. Rates count computed
blocks only: 4 D multiply-adds' operations per score forward, 10 D backward.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffdistill.errors import UserError
from diffdistill.evaluation.plots import check_picture
from diffdistill.kernels.attention import bench_cuda, ceiling, cpu
from diffdistill.kernels.attention.bench_floors import Floor, floors
from diffdistill.kernels.attention.bench_plot import plot_rates
from diffdistill.kernels.attention.bench_runners import MASKS, Group, Runner, runners
from diffdistill.kernels.attention.bench_threads import Scaling, scaling
from diffdistill.machine import machine

SCHEMA = 1
MISSED, NOISY = 1, 3
STEADY = 0.15  # the ceiling's spread in a group, of its median
DENSITIES = (1.0, 0.3, 0.1)
QUICK_DENSITIES, QUICK_REPEATS = (1.0, 0.1), 5


@dataclass(frozen=True)
class Side:
    """How one kind of device is measured. runners: of a group.  rate: the ceiling, operations per second, 0 for none.
    seconds: of a call.  facts: beside what is known of the machine.  unit: of printed rates, and GF/s in it.
    """

    runners: Callable[[Group], list[Runner]]
    rate: Callable[[Group], float]
    seconds: Callable[[Callable[[], object]], float]
    facts: Callable[[], dict[str, Any]]
    unit: tuple[str, float]


@dataclass(frozen=True)
class Measured:
    """One runner of one group. density: the exact share of blocks.  milliseconds: median.  spread: (max - min) /
    median.  gflops: on computed blocks.  share: of the group's ceiling, None where that has no such unit or the runner
    computes no blocks."""

    length: int
    width: int
    dtype: str
    direction: str
    runner: str
    density: float
    milliseconds: float
    spread: float
    gflops: float
    share: float | None


@dataclass(frozen=True)
class Ceiling:
    """Multiply-add rate of one thread during a group, GF/s, and its spread (max - min) / median."""

    dtype: str
    gflops: float
    spread: float


def attention(device: str, repeats: int, quick: bool, out: str | None, plot: str | None) -> int:
    """Bench every group, print a table each and the verdict last. Returns the exit status.

    device: cpu | cuda.  repeats: interleaved rounds.  quick: 5 rounds at one length and width, within a minute.
    out: JSON file.  plot: picture.
    """
    if device not in ("cpu", "cuda"):
        raise UserError("device", "must be cpu or cuda", repr(device), "Mend the name.")
    if repeats < 5:
        raise UserError("repeats", "must be >= 5", repeats, "7 is a good number: medians are compared.")
    for key, path in (("out", out), ("plot", plot)):
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise UserError(key, "must name a file in an existing folder", path, "Make the folder, or name a file.")
    if plot is not None:
        check_picture(plot, "plot")
    repeats = QUICK_REPEATS if quick else repeats
    if device == "cuda":
        bench_cuda.check()
        return run(bench_cuda.groups(quick), repeats, None, out, plot, GPU)
    if not cpu.available():
        fix = "Install a C++ compiler, or run it on another machine."
        raise UserError("bench attention", "must find its kernel", cpu.why_not(), fix)
    if quick:
        return run(quick_groups(), repeats, None, out, plot)
    return run(all_groups(), repeats, scaling, out, plot)


def quick_groups() -> list[Group]:
    """Forward in both types, backward in bfloat16; compiling flex alone would take longer than all of it."""
    kinds = (("bf16", "forward"), ("fp32", "forward"), ("bf16", "backward"))
    return [Group(4096, 128, dtype, direction, QUICK_DENSITIES, ("sdpa",)) for dtype, direction in kinds]


def all_groups() -> list[Group]:
    """Every length, width, type and direction, and masks where attention is longest."""
    rivals = {"forward": ("sdpa", "flex", "gather_sdpa", "gather_bmm"), "backward": ("sdpa", "gather_bmm")}
    masks = {(16384, 128, "forward"): tuple(MASKS)}
    return [
        Group(
            length, width, dtype, direction, DENSITIES, (*rivals[direction], *masks.get((length, width, direction), ()))
        )
        for length in (4096, 16384)
        for width in (64, 128)
        for dtype in ("bf16", "fp32")
        for direction in ("forward", "backward")
    ]


def run(
    groups: list[Group],
    repeats: int,
    threads: Callable[[], Scaling] | None,
    out: str | None,
    plot: str | None,
    side: Side | None = None,
) -> int:
    """Measure the groups, then (if given) two threads; write and print. Returns the exit status. side: None is CPU."""
    side = side or CPU
    console = Console()
    measured: list[Measured] = []
    ceilings: list[Ceiling] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        facts = side.facts()
        console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
        for group in groups:
            rows, top = _measure(group, repeats, side)
            measured, ceilings = [*measured, *rows], [*ceilings, top]
            console.print(_table(group, rows, top, side.unit))
    finally:
        torch.set_num_threads(before)
    two = None if threads is None else threads()
    found = floors(measured, two) if side is CPU else []
    if out is not None:
        report = {
            "schema": SCHEMA,
            "machine": {**machine(), "threads": 1, **facts},
            "repeats": repeats,
            "ceilings": [{**group.name, **asdict(c)} for group, c in zip(groups, ceilings, strict=True)],
            "results": [asdict(m) for m in measured],
            "threads": None if two is None else asdict(two),
            "floors": [{**asdict(f), "met": f.met} for f in found],
        }
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    if plot is not None:
        plot_rates(measured, ceilings, groups, plot, side.unit)
    return _verdict(console, found, ceilings)


def _measure(group: Group, repeats: int, side: Side) -> tuple[list[Measured], Ceiling]:
    """Interleaved rounds of the ceiling and every runner, after one that warms up and compiles."""
    torch.compiler.reset()  # flex compiles anew for each shape, and dynamo counts
    contestants = side.runners(group)
    for contestant in contestants:
        contestant.call()
    rates: list[float] = []
    taken: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats):
        rates.append(side.rate(group))
        for times, contestant in zip(taken, contestants, strict=True):
            times.append(side.seconds(contestant.call))
    top = Ceiling(group.dtype, statistics.median(rates) / 1e9, _spread(rates))
    rows = [_row(group, c, times, top) for c, times in zip(contestants, taken, strict=True)]
    return rows, top


def _row(group: Group, runner: Runner, times: list[float], top: Ceiling) -> Measured:
    seconds = statistics.median(times)
    gflops = runner.operations / seconds / 1e9
    return Measured(
        **group.name,
        runner=runner.name,
        density=runner.density,
        milliseconds=1000 * seconds,
        spread=_spread(times),
        gflops=gflops,
        share=gflops / top.gflops if top.gflops and gflops else None,
    )


def _rate(group: Group) -> float:
    """The ceiling, 0 where the processor has no such multiply-add."""
    if group.dtype == "bf16" and cpu.variant() != "avx512_bf16":
        return 0.0
    return ceiling.register_rate(group.dtype, 0.1)


def _clock(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _facts() -> dict[str, Any]:
    return {"kernel": cpu.variant(), "bandwidth_gb_per_s": round(ceiling.bandwidth() / 1e9, 1)}


CPU = Side(runners, _rate, _clock, _facts, ("GF/s", 1.0))
GPU = Side(bench_cuda.runners, bench_cuda.rate, bench_cuda.seconds, bench_cuda.facts, ("TF/s", 1000.0))


def _spread(values: list[float]) -> float:
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def _table(group: Group, rows: list[Measured], top: Ceiling, unit: tuple[str, float]) -> Table:
    name, size = unit
    title = (
        f"{group.direction}, {group.dtype}, S={group.length}, D={group.width}: ceiling {top.gflops / size:.0f} {name}"
    )
    table = Table("runner", "density", "ms", name, "of the ceiling", title=title)
    for row in rows:
        share = "" if row.share is None else f"{row.share:.0%}"
        rate = f"{row.gflops / size:.0f}" if row.gflops else ""
        table.add_row(row.runner, f"{row.density:.3f}", f"{row.milliseconds:.2f}", rate, share)
    return table


def _verdict(console: Console, found: list[Floor], ceilings: list[Ceiling]) -> int:
    table = Table("floor", "measured", "at least", "goal")
    for floor in found:
        table.add_row(floor.name, f"{floor.value:.2f}", f"{floor.least:.2f}", f"{floor.goal:.2f}")
    if found:
        console.print(table)
    unsteady = max(c.spread for c in ceilings)
    missed = [floor for floor in found if not floor.met]
    if unsteady > STEADY:
        console.print(
            f"verdict: too noisy to tell (the ceiling varied by {unsteady:.0%}, at most {STEADY:.0%} is steady)"
        )
        return NOISY
    if not found:
        console.print("verdict: no floors are set for this device")
        return 0
    if missed:
        names = "; ".join(f"{floor.name}: {floor.value:.2f} < {floor.least:.2f}" for floor in missed)
        console.print(f"verdict: {len(missed)} of {len(found)} floors missed: {names}", soft_wrap=True)
        return MISSED
    goals = sum(floor.value >= floor.goal for floor in found)
    console.print(f"verdict: all {len(found)} floors met, {goals} of the goals")
    return 0
