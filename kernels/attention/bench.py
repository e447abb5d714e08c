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

import torch
from rich.console import Console
from rich.table import Table

from diffdistill.errors import UserError
from diffdistill.evaluation.plots import check_picture
from diffdistill.kernels.attention import ceiling, cpu
from diffdistill.kernels.attention.bench_floors import Floor, floors
from diffdistill.kernels.attention.bench_plot import plot_rates
from diffdistill.kernels.attention.bench_runners import Group, Runner, runners
from diffdistill.kernels.attention.bench_threads import Scaling, scaling
from diffdistill.machine import machine

SCHEMA = 1
MISSED, NOISY = 1, 3
STEADY = 0.15  # the ceiling's spread in a group, of its median
DENSITIES = (1.0, 0.3, 0.1)
QUICK_DENSITIES, QUICK_REPEATS = (1.0, 0.1), 5


@dataclass(frozen=True)
class Measured:
    """One runner of one group. density: the exact share of blocks.  milliseconds: median.  spread: (max - min) /
    median.  gflops: on computed blocks.  share: of the group's ceiling, None where that has no such unit."""

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


def attention(repeats: int, quick: bool, out: str | None, plot: str | None) -> int:
    """Bench every group, print a table each and the verdict last. Returns the exit status.

    repeats: interleaved rounds.  quick: 5 rounds at 4096 tokens and width 128, within 50 s.  out: JSON file.
    plot: picture.
    """
    if repeats < 5:
        raise UserError("repeats", "must be >= 5", repeats, "7 is a good number: medians are compared.")
    for key, path in (("out", out), ("plot", plot)):
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise UserError(key, "must name a file in an existing folder", path, "Make the folder, or name a file.")
    if plot is not None:
        check_picture(plot, "plot")
    if not cpu.available():
        fix = "Install a C++ compiler, or run it on another machine."
        raise UserError("bench attention", "must find its kernel", cpu.why_not(), fix)
    if quick:
        return run(quick_groups(), QUICK_REPEATS, None, out, plot)
    return run(all_groups(), repeats, scaling, out, plot)


def quick_groups() -> list[Group]:
    """Forward in both types, backward in bfloat16; compiling flex alone would take longer than all of it."""
    kinds = (("bf16", "forward"), ("fp32", "forward"), ("bf16", "backward"))
    return [Group(4096, 128, dtype, direction, QUICK_DENSITIES, ("sdpa",)) for dtype, direction in kinds]


def all_groups() -> list[Group]:
    """Every length, width, type and direction."""
    rivals = {"forward": ("sdpa", "flex", "gather_sdpa", "gather_bmm"), "backward": ("sdpa", "gather_bmm")}
    return [
        Group(length, width, dtype, direction, DENSITIES, rivals[direction])
        for length in (4096, 16384)
        for width in (64, 128)
        for dtype in ("bf16", "fp32")
        for direction in ("forward", "backward")
    ]


def run(
    groups: list[Group], repeats: int, threads: Callable[[], Scaling] | None, out: str | None, plot: str | None
) -> int:
    """Measure the groups, then (if given) two threads; write and print. Returns the exit status."""
    console = Console()
    measured: list[Measured] = []
    ceilings: list[Ceiling] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bandwidth = ceiling.bandwidth()
        console.print(f"kernel {cpu.variant()}, memory {bandwidth / 1e9:.1f} GB/s")
        for group in groups:
            rows, top = _measure(group, repeats)
            measured, ceilings = [*measured, *rows], [*ceilings, top]
            console.print(_table(group, rows, top))
    finally:
        torch.set_num_threads(before)
    two = None if threads is None else threads()
    found = floors(measured, two)
    if out is not None:
        report = {
            "schema": SCHEMA,
            "machine": {**machine(), "threads": 1, "kernel": cpu.variant(), "bandwidth": bandwidth},
            "repeats": repeats,
            "ceilings": [{**group.name, **asdict(c)} for group, c in zip(groups, ceilings, strict=True)],
            "results": [asdict(m) for m in measured],
            "threads": None if two is None else asdict(two),
            "floors": [{**asdict(f), "met": f.met} for f in found],
        }
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    if plot is not None:
        plot_rates(measured, ceilings, groups, plot)
    return _verdict(console, found, ceilings)


def _measure(group: Group, repeats: int) -> tuple[list[Measured], Ceiling]:
    """Interleaved rounds of the ceiling and every runner, after one that warms up and compiles."""
    torch.compiler.reset()  # flex compiles anew for each shape, and dynamo counts
    contestants = runners(group)
    for contestant in contestants:
        contestant.call()
    rates: list[float] = []
    taken: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats):
        rates.append(_rate(group.dtype))
        for times, contestant in zip(taken, contestants, strict=True):
            times.append(_clock(contestant.call))
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
        share=gflops / top.gflops if top.gflops else None,
    )


def _rate(dtype: str) -> float:
    """The ceiling, 0 where the processor has no such multiply-add."""
    if dtype == "bf16" and cpu.variant() != "avx512_bf16":
        return 0.0
    return ceiling.register_rate(dtype, 0.1)


def _clock(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _spread(values: list[float]) -> float:
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def _table(group: Group, rows: list[Measured], top: Ceiling) -> Table:
    title = f"{group.direction}, {group.dtype}, S={group.length}, D={group.width}: ceiling {top.gflops:.0f} GF/s"
    table = Table("runner", "density", "ms", "GF/s", "of the ceiling", title=title)
    for row in rows:
        share = "" if row.share is None else f"{row.share:.0%}"
        table.add_row(row.runner, f"{row.density:.3f}", f"{row.milliseconds:.2f}", f"{row.gflops:.0f}", share)
    return table


def _verdict(console: Console, found: list[Floor], ceilings: list[Ceiling]) -> int:
    table = Table("floor", "measured", "at least", "goal")
    for floor in found:
        table.add_row(floor.name, f"{floor.value:.2f}", f"{floor.least:.2f}", f"{floor.goal:.2f}")
    console.print(table)
    unsteady = max(c.spread for c in ceilings)
    missed = [floor for floor in found if not floor.met]
    if unsteady > STEADY:
        console.print(
            f"verdict: too noisy to tell (the ceiling varied by {unsteady:.0%}, at most {STEADY:.0%} is steady)"
        )
        return NOISY
    if missed:
        names = "; ".join(f"{floor.name}: {floor.value:.2f} < {floor.least:.2f}" for floor in missed)
        console.print(f"verdict: {len(missed)} of {len(found)} floors missed: {names}", soft_wrap=True)
        return MISSED
    goals = sum(floor.value >= floor.goal for floor in found)
    console.print(f"verdict: all {len(found)} floors met, {goals} of the goals")
    return 0
