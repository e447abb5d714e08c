"""Every fault this package promises to bear, many times: `make chaos` prints one table, `--short` a quick one.

Kills and signals at random moments, nans in one tensor, damaged files, full disks, a loader that stands still, a
process that is lost. `--page docs/faults.md` writes the table into the page.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import chaos_files
import chaos_steps
import torch
from chaos_kills import Row, signals

from diffdistill.machine import machine

HEAD = """| fault | cases | survived or detected | steps lost: mean, largest | bit-equal after it |
|---|---|---|---|---|"""
BEGIN, END = "<!-- table of make chaos -->\n", "<!-- end of the table -->"
Part = Callable[[int, int, Path], Row]


def parts(short: bool) -> dict[str, tuple[Part, int]]:
    """Each part by its name, and how many cases."""
    nans: dict[str, tuple[Part, int]] = {
        f"nan-{kind.split()[0]}": (partial(chaos_steps.nans, kind), 1 if short else 10) for kind in chaos_steps.NANS
    }
    return {
        "kill": (lambda n, seed, at: signals(signal.SIGKILL, n, seed, at, 20 * n + 100), 10 if short else 100),
        "term": (lambda n, seed, at: signals(signal.SIGTERM, n, seed, at, 40 * n + 100), 2 if short else 20),
        **nans,
        "stall": (chaos_steps.stalls, 2 if short else 6),
        "checkpoint": (chaos_files.checkpoints, 2 if short else 40),
        "shard": (chaos_files.shards, 20 if short else 500),
        "full": (chaos_files.full_disks, 2 if short else 8),
        "read-only": (chaos_files.read_only, 1 if short else 4),
        "rank": (chaos_steps.lost_rank, 0 if short else 2),
    }


def run(only: list[str], short: bool, seed: int) -> list[Row]:
    """The parts asked for, told on stderr as they come; all without `only`."""
    rows = []
    for name, (part, num) in parts(short).items():
        if num == 0 or (only and name not in only):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as aside:
            row = part(num, seed, Path(aside))
        print(f"{row} {time.monotonic() - began:.0f} s", *row.notes, sep="\n  ", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def write(page: Path, rows: list[str], command: str, seconds: float) -> None:
    """Put rows between the page's marks, with what made them; those of other faults that stand there stay."""
    found = machine()
    made = (
        f"Made by `{command}` in {seconds / 60:.0f} minutes: {found['cores']} cores ({found['processor']}), "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}.\n"
    )
    before, _, rest = page.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    found = {line.split("|")[1]: line for line in old.splitlines() if line.startswith("| ")}
    found = {name: line for name, line in found.items() if line not in HEAD}
    found |= {line.split("|")[1]: line for line in rows}
    table = "\n".join([HEAD, *found.values()])
    page.write_text(f"{before}{BEGIN}{table}\n\n{made}{END}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", action="append", default=[], choices=list(parts(short=True)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    rows = run(given.only, given.short, given.seed)
    print("\n".join([HEAD, *map(str, rows)]), flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if given.page is not None:
        command = " ".join(["make chaos", *([f'ARGS="--only {" --only ".join(given.only)}"'] if given.only else [])])
        write(given.page, list(map(str, rows)), command, time.monotonic() - began)
    sys.exit(0 if all(row.well for row in rows) else 1)
