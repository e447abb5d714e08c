"""Kills and SIGTERMs at random moments of one run, which goes on until it is done.

Each process is a fork of one that has torch imported already, so that a kill costs seconds less; to the files a killed
fork is a killed process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from interruption import assert_equal

from diffdistill import checkpoint
from diffdistill.cli import main

QUICK = [
    "train", "data=gmm2d", "distiller=dmd2", "distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1",
    "trainer.batch_size=16", "trainer.log_every=1", "trainer.checkpoint_every=5", "trainer.keep=2",
]  # fmt: skip
WORDS = [
    *QUICK, "evaluation.teacher=none", "evaluation.metrics=[swd]", "evaluation.num_samples=50",
    "evaluation.interim_samples=40", "evaluation.every=20",
]  # fmt: skip
QUICK += ["evaluation=none", "probe=null"]


@dataclass
class Row:
    """One line of the table. cases: tried.  good: of them survived or detected, as `word` says.  lost: steps done
    again, by case.  equal: whether every run that went on ended bit-equal to the undisturbed one; None: none had to.
    notes: what went wrong, and what belongs to the line.
    """

    fault: str
    word: str
    cases: int = 0
    good: int = 0
    lost: list[int] = field(default_factory=list)
    equal: bool | None = None
    notes: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def well(self) -> bool:
        return bool(self.skipped) or (self.cases > 0 and self.good == self.cases and self.equal is not False)

    def count(self, good: bool, note: str) -> None:
        """One more case. note: of a bad one."""
        self.cases += 1
        self.good += good
        if not good:
            self.notes.append(f"BAD: {note}")

    def went_on(self, equal: bool) -> None:
        self.equal = equal and self.equal is not False

    def __str__(self) -> str:
        if self.skipped:
            return f"| {self.fault} | not run: {self.skipped} | | | |"
        lost = f"{sum(self.lost) / len(self.lost):.1f}, {max(self.lost)}" if self.lost else ""
        equal = {None: "", True: "yes", False: "NO"}[self.equal]
        return f"| {self.fault} | {self.cases} | {self.good} {self.word} | {lost} | {equal} |"


def start(words: list[str], log: Path, before: Callable[[], object] = lambda: None) -> int:
    """The command line in a fork of this process, which calls `before` first; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        before()
        status = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
    return 0


def finished(words: list[str], log: Path, before: Callable[[], object] = lambda: None) -> int:
    """Run the command line to its end in a fork; returns its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start(words, log, before), 0)[1])


def ended(pid: int) -> bool:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run ended with {os.waitstatus_to_exitcode(status)}")
    return bool(done)


def hit_at(pid: int, folder: Path, moment: float | None, number: signal.Signals) -> tuple[bool, bool]:
    """Send the signal after `moment` seconds of training, or inside the next save where it is None.

    Returns (sent, inside a save); the run may be done first. What an earlier kill left half written goes away before
    training begins, which shows as lines that metrics.jsonl gains after it was cut.
    """
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    lowest, began = 1 << 60, None
    while not ended(pid):
        size = metrics.stat().st_size if metrics.is_file() else 0
        lowest = min(lowest, size)
        if began is None and size > lowest:
            began = time.monotonic()
        if began is not None:
            saving = checkpoints.is_dir() and any(name.startswith(".writing-") for name in os.listdir(checkpoints))
            if saving if moment is None else time.monotonic() - began >= moment:
                os.kill(pid, number)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if status != (-signal.SIGKILL if number == signal.SIGKILL else 0):
                    raise AssertionError(f"after {number.name} the run ended with {status}")
                return True, saving
        time.sleep(0.0005)
    return False, False


def last_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    found = 0
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
            found = found if "failed" in values else max(found, values["step"])
        except ValueError:
            continue  # cut by the kill
    return found


def same(ours: Path, theirs: Path) -> bool:
    try:
        assert_equal(ours, theirs)
    except AssertionError:
        return False
    return True


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint, 0 without one. Every committed one must be whole, whenever the fault came."""
    found = checkpoint.steps(folder / "checkpoints")
    for path in found:
        checkpoint.verified(path)
    return int(found[-1].name[5:]) if found else 0


@functools.cache
def _undisturbed(words: tuple[str, ...]) -> Path:
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        status = main([*words, f"run_dir={place / 'run'}", "dry_run=true"])
    if status:  # it brings in what forks would import one by one
        raise AssertionError("the command line is at fault")
    if finished([*words, f"run_dir={place / 'run'}"], place / "log"):
        raise AssertionError((place / "log").read_text())
    return place / "run"


def undisturbed(words: list[str]) -> Path:
    """A run of these words that nothing disturbs; made once."""
    return _undisturbed(tuple(words))


def signals(number: signal.Signals, times: int, seed: int, place: Path, steps: int) -> Row:
    """Train a run that the signal hits `times` times; every second time inside a save."""
    row = Row(
        {signal.SIGKILL: "SIGKILL at random moments", signal.SIGTERM: "SIGTERM at random moments"}[number], "survived"
    )
    draws, words, mid_save = random.Random(seed), [*WORDS, f"trainer.steps={steps}"], 0
    whole, broken, log = undisturbed(words), place / "broken", place / "log"
    for index in range(times):
        moment = None if index % 2 else draws.uniform(0.0, 0.4)
        hit, saving = hit_at(start([*words, f"run_dir={broken}", "resume=auto"], log), broken, moment, number)
        if not hit:
            row.notes.append(f"BAD: done after {index}: too few steps for so many")
            break
        mid_save += saving
        row.lost.append(last_logged(broken) - newest_step(broken))
        row.count(True, "")
    status = finished([*words, f"run_dir={broken}", "resume=auto"], log)
    met = log.read_text().count("damaged checkpoint")
    row.went_on(status == 0 and met == 0 and row.cases == times and same(whole, broken))
    row.notes.append(f"{mid_save} of them inside a save; damaged checkpoints met: {met}")
    return row
