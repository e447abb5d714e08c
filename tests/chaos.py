"""Kills training processes with SIGKILL, at random moments and inside saves, and lets the run go on until it is done.

`python tests/chaos.py --kills 100` (`make chaos`) prints the kills, the steps that were lost to them and whether the
run is bit-equal to one that was never interrupted. The default tests do it with 10 kills.

Each process is a fork of one that has torch imported already, so that a kill costs seconds less; to the files a killed
fork is a killed process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from interruption import assert_equal

from diffdistill import checkpoint
from diffdistill.cli import main

WORDS = [
    "train", "data=gmm2d", "distiller=dmd2", "distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1",
    "trainer.batch_size=16", "trainer.log_every=1", "trainer.checkpoint_every=5", "trainer.keep=2",
    "evaluation.teacher=none", "evaluation.metrics=[swd]", "evaluation.num_samples=50",
    "evaluation.interim_samples=40", "evaluation.every=20",
]  # fmt: skip


@dataclass
class Report:
    """kills: in all; mid_save: of them while a checkpoint was being written.  lost: steps done again, per kill.
    picked_bad: damaged checkpoints that the run had to pass over (a kill must make none)."""

    kills: int = 0
    mid_save: int = 0
    lost: list[int] = field(default_factory=list)
    picked_bad: int = 0
    equal: bool = False
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills (SIGKILL), {self.mid_save} of them inside a save; steps lost per kill: "
            f"mean {sum(self.lost) / max(1, len(self.lost)):.1f}, largest {max(self.lost, default=0)}; "
            f"damaged checkpoints met: {self.picked_bad}; "
            f"{'bit-equal to' if self.equal else 'DIFFERENT from'} the uninterrupted run; {self.seconds:.0f} s"
        )


def start(words: list[str], log: Path) -> int:
    """The command line in a fork of this process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        status = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
    return 0


def ended(pid: int) -> bool:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run ended with {os.waitstatus_to_exitcode(status)}")
    return bool(done)


def kill_at(pid: int, folder: Path, moment: float | None) -> tuple[bool, bool]:
    """Kill after `moment` seconds of training, or inside the next save where it is None.

    Returns (killed, inside a save); the run may be done first. What an earlier kill left half written goes away before
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
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True, saving
        time.sleep(0.0005)
    return False, False


def last_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    found = 0
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found = max(found, json.loads(line)["step"])
        except ValueError:
            continue  # cut by the kill
    return found


def same(ours: Path, theirs: Path) -> bool:
    try:
        assert_equal(ours, theirs)
    except AssertionError:
        return False
    return True


def run(kills: int, seed: int, place: Path, steps: int) -> Report:
    """Train whole, then train killed `kills` times; every second kill falls into a save."""
    report, draws, began = Report(), random.Random(seed), time.monotonic()
    words = [*WORDS, f"trainer.steps={steps}"]
    whole, broken, log = place / "whole", place / "broken", place / "log"
    if main([*words, f"run_dir={whole}", "dry_run=true"]):  # brings in everything that forks would import one by one
        raise AssertionError("the command line is at fault")
    pid = start([*words, f"run_dir={whole}"], log)
    while not ended(pid):
        time.sleep(0.01)
    while report.kills < kills:
        moment = None if report.kills % 2 else draws.uniform(0.0, 0.4)
        pid = start([*words, f"run_dir={broken}", "resume=auto"], log)
        killed, saving = kill_at(pid, broken, moment)
        if not killed:
            break  # done before its kill: `steps` is too small for so many
        report.kills += 1
        report.mid_save += saving
        found = checkpoint.steps(broken / "checkpoints")
        for path in found:  # every committed checkpoint is whole, whenever the kill came
            checkpoint.verified(path)
        report.lost.append(last_logged(broken) - (int(found[-1].name[5:]) if found else 0))
    pid = start([*words, f"run_dir={broken}", "resume=auto"], log)
    while not ended(pid):
        time.sleep(0.01)
    report.picked_bad = log.read_text().count("damaged checkpoint")
    report.equal = same(whole, broken)
    report.seconds = time.monotonic() - began
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        printed = run(given.kills, given.seed, Path(aside), given.steps)
    print(printed, flush=True)
    sys.exit(0 if printed.equal and printed.kills == given.kills else 1)
