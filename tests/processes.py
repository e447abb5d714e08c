"""Command lines run by several processes that meet over gloo, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT = int(os.environ.get("LIMIT", "240"))  # seconds


@dataclass(frozen=True)
class Ended:
    """A process that ended. statuses: of each command line it ran."""

    status: int
    statuses: list[int]
    out: str
    err: str


def start(size: int, words: Sequence[str], extra: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """`python WORDS` on `size` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    common = {
        **os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(paths), **(extra or {}),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for them; one that hangs is made to show where, and ends with -6."""
    found, until = [], time.monotonic() + LIMIT
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            out, err = process.communicate()
        told = [line for line in out.splitlines() if line.startswith("STATUSES ")]
        found.append(Ended(process.returncode, json.loads(told[-1][9:]) if told else [], out, err))
    return found


def run(size: int, lines: Sequence[Sequence[str]], patch: str = "") -> list[Ended]:
    """Command lines of diffdistill, one after the other in the same processes, which start slowly.

    patch: module:function that each process calls before.
    """
    return ended(start(size, ["-m", "processes", patch, json.dumps([list(line) for line in lines])]))


def in_float64() -> None:
    """Networks, data and optimizers of every run from here on in float64: what is left of a difference is no rounding."""
    from diffdistill import recipe

    original = recipe.assemble_parts

    def assemble_parts(settings: Any, data: Any, teacher: Any, *rest: Any) -> Any:
        return original(settings, data, teacher.double(), *rest)

    recipe.assemble_parts = assemble_parts


def main() -> None:
    import importlib

    from diffdistill.cli import main as diffdistill
    from diffdistill.parallel import Parallel

    patch, lines = sys.argv[1:]
    if patch:
        module, _, name = patch.partition(":")
        getattr(importlib.import_module(module), name)()
    with Parallel().running():  # one meeting for all
        statuses = [diffdistill(line) for line in json.loads(lines)]
    print(f"STATUSES {json.dumps(statuses)}")


if __name__ == "__main__":
    main()
