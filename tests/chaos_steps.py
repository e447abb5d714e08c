"""Steps that go wrong: a nan in one tensor, a loader that stands still, a process of several that is killed."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chaos_kills import QUICK, Row, finished, last_logged, newest_step, same, undisturbed
from safetensors.torch import load_file

from diffdistill import checkpoint
from diffdistill.data import Mixture2D
from diffdistill.networks.roles import Networks
from diffdistill.trainer import Trainer

NANS = ("weight", "gradient", "optimizer state", "data")
STEPS = 40
LIMIT = 4  # seconds of the watchdog: on a busy machine an import takes one


def nans(kind: str, num: int, seed: int, place: Path) -> Row:
    """A nan in one element of one tensor at one step; then the run goes on without it."""
    what = "a batch of data" if kind == "data" else f"one {kind}"
    row, draws = Row(f"a nan in {what}", "detected"), random.Random(seed)
    words = [*QUICK, f"trainer.steps={STEPS}"]
    whole = undisturbed(words)
    for index in range(num):
        folder, log = place / f"nan-{index}", place / f"nan-{index}.log"
        role, step = draws.choice(["student", "fake_score"]), draws.randrange(3, STEPS - 5)
        status = finished([*words, f"run_dir={folder}"], log, partial(poison, kind, role, step, draws.random()))
        text = log.read_text()
        named = {
            "weight": rf"error: {role}: weight \S+ must be finite",
            "gradient": rf"error: {role}: gradient of \S+ must be finite",
            "optimizer state": rf"error: {role}: optimizer state exp_avg(_sq)? of \S+ must be finite",
            "data": r"error: batch of data: x0 must be finite",
        }[kind]
        good = status == 2 and re.search(named, text) is not None and text.count("error: ") == 1
        row.count(good and all_finite(folder), f"{status}: {text[-300:]}")
        row.lost.append(max(0, last_logged(folder) - newest_step(folder)))
        row.went_on(finished([*words, f"run_dir={folder}", "resume=auto"], log) == 0 and same(whole, folder))
    return row


def all_finite(folder: Path) -> bool:
    """Of every checkpoint that stands: nothing was saved that is spoilt."""
    files = [file for path in checkpoint.steps(folder / "checkpoints") for file in path.glob("*.safetensors")]
    return all(bool(value.isfinite().all()) for file in files for value in load_file(file).values())


def poison(kind: str, role: str, step: int, which: float) -> None:
    """Write a nan into a tensor of this process at the step, or at the first after it that trains the role."""
    done: list[int] = []

    def spoil(tensors: list[torch.Tensor]) -> None:
        tensor = tensors[int(which * len(tensors))]
        done.append(1)
        with torch.no_grad():
            tensor.view(-1)[int(which * tensor.numel())] = float("nan")

    def after_settling(networks: Networks) -> Callable[..., None]:
        def settle(names: Sequence[str]) -> None:
            del networks.settle  # type: ignore[method-assign]
            networks.settle(names)
            spoil([weight.grad for weight in networks.weights(role) if weight.grad is not None])

        return settle

    name = "batches" if kind == "data" else "update"
    original = getattr(Trainer, name)

    def spoilt(self: Trainer, *args: Any) -> Any:
        if kind == "gradient" and not done and role in args[0].trains and args[2] >= step:
            args[3].settle = after_settling(args[3])
        if kind in ("weight", "optimizer state") and not done and args[2] >= step:
            networks, optimizers = args[3], args[4]
            states = [s for s in optimizers[role].state.values() if "exp_avg" in s]
            if kind == "weight":
                spoil(networks.weights(role))
            elif states:
                spoil([s[key] for s in states for key in ("exp_avg", "exp_avg_sq")])
        found = original(self, *args)
        if kind == "data" and not done and args[3] >= step:
            spoil([found[0].x0])
        return found

    setattr(Trainer, name, spoilt)


def stalls(num: int, seed: int, place: Path) -> Row:
    """A loader that stands still: told with its phase; every second time the watchdog ends the process."""
    row, draws = Row("a loader that stands still", "detected"), random.Random(seed)
    words = [*QUICK, f"trainer.steps={STEPS}"]
    whole = undisturbed(words)
    for index in range(num):
        folder, log, call = place / f"stall-{index}", place / f"stall-{index}.log", draws.randrange(2, STEPS)
        ends = index % 2 == 1
        limits = [f"watchdog.seconds={LIMIT}", f"watchdog.exit_status={75 if ends else 'null'}"]
        status = finished(
            [*words, *limits, f"run_dir={folder}"], log, partial(stall, call, 1000.0 if ends else 2.5 * LIMIT)
        )
        told = re.search(r'warning: rank 0 has stood still for \S+ s in "data" after step (\d+)', log.read_text())
        good = status == (75 if ends else 0) and told is not None and (folder / "stacks-0.txt").is_file()
        row.count(good, f"{status}: {log.read_text()[-300:]}")
        row.lost.append(max(0, last_logged(folder) - newest_step(folder)))
        if ends:
            status = finished([*words, f"run_dir={folder}", "resume=auto", "watchdog=null"], log)
        row.went_on(status == 0 and same(whole, folder))
    return row


def stall(call: int, seconds: float) -> None:
    original, count = Mixture2D.batch, [0]

    def batch(self: Mixture2D, *args: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            time.sleep(seconds)
        return original(self, *args)

    Mixture2D.batch = batch  # type: ignore[method-assign]


# --- several processes

PATIENCE = 30  # seconds that a process waits for the others


def lost_rank(num: int, seed: int, place: Path) -> Row:
    """One of two processes is killed: the other must end with a message, in time; then both go on."""
    row, draws = Row("one of two processes killed", "survived"), random.Random(seed)
    words = [*QUICK, f"parallel.timeout={PATIENCE}"]
    whole = place / "two"
    if [p.wait() for p in pair([*words, "trainer.steps=60", f"run_dir={whole}"], place / "two.log")] != [0, 0]:
        raise AssertionError((place / "two.log").read_text())
    for index in range(num):
        folder, log = place / f"pair-{index}", place / f"pair-{index}.log"
        processes = pair([*words, "trainer.steps=60", f"run_dir={folder}"], log)
        deadline = time.monotonic() + 240
        while last_logged(folder) < 12 and time.monotonic() < deadline:
            time.sleep(0.005)
        killed = draws.randrange(2)
        processes[killed].send_signal(signal.SIGKILL)
        try:
            status: int | None = processes[1 - killed].wait(PATIENCE + 60)
        except subprocess.TimeoutExpired:
            status = None
            processes[1 - killed].kill()
        text = log.read_text()
        row.count(status not in (0, None) and "error: " in text and "Traceback" not in text, f"{status}: {text[-600:]}")
        row.lost.append(last_logged(folder) - newest_step(folder))
        again = pair([*words, "trainer.steps=60", f"run_dir={folder}", "resume=auto"], log)
        row.went_on([process.wait() for process in again] == [0, 0] and same(whole, folder))
    return row


def pair(words: list[str], log: Path) -> list[subprocess.Popen[bytes]]:
    """The command line in two processes, started as torchrun starts them, but without its agent, which ends both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with log.open("ab") as out:
        return [
            subprocess.Popen(
                [sys.executable, "-m", "diffdistill", *words], stdout=out, stderr=out,
                env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
