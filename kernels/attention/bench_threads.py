"""Two threads against one, by wall clock, beside what two independent processes reach on the same machine."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from diffdistill.kernels.attention.bench_runners import Group, Runner, runners

LENGTH, WIDTH, DENSITY = 16384, 128, 0.3
ROUNDS = 7


@dataclass(frozen=True)
class Scaling:
    """ratios: by direction, the speed of two threads over one, times 2 over what two processes do in place of one.
    processes: by direction, the work that two processes finish in the time of one, at most 2."""

    ratios: dict[str, float]
    processes: dict[str, float]


def scaling() -> Scaling:
    """Forward and backward in bfloat16."""
    ratios, processes = {}, {}
    for direction in ("forward", "backward"):
        one, two = _threads(direction)
        processes[direction] = 2 * _process(direction, 1) / _process(direction, 2)
        ratios[direction] = (one / two) * 2 / processes[direction]
    return Scaling(ratios, processes)


def _ours(direction: str) -> Runner:
    return runners(Group(LENGTH, WIDTH, "bf16", direction, (DENSITY,), ()))[0]


def _threads(direction: str) -> tuple[float, float]:
    """Seconds with one thread and with two, interleaved."""
    call, before = _ours(direction).call, torch.get_num_threads()
    taken: dict[int, list[float]] = {1: [], 2: []}
    try:
        for _ in range(ROUNDS + 1):
            for threads, times in taken.items():
                torch.set_num_threads(threads)
                times.append(_wall(call))
    finally:
        torch.set_num_threads(before)
    return statistics.median(taken[1][1:]), statistics.median(taken[2][1:])


def _process(direction: str, number: int) -> float:
    """Median seconds of a call in `number` processes at once, one thread each."""
    command = [sys.executable, "-m", __name__, direction]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
    ]
    for process in running:  # each says when it is ready, so that they run together
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return statistics.median(float(process.communicate()[0]) for process in running)


def _wall(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started


def _child(direction: str) -> None:
    torch.set_num_threads(1)
    call = _ours(direction).call
    call()
    print("ready", flush=True)
    sys.stdin.readline()
    print(statistics.median(_wall(call) for _ in range(ROUNDS)))


if __name__ == "__main__":
    _child(sys.argv[1])
