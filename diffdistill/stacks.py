"""Stacks of all threads, on SIGUSR1 and for the watchdog: to stderr, and in a run into a file of its folder."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from . import activity
from .logs import rank

HAS_SIGNAL = hasattr(faulthandler, "register")  # not on Windows


def to_stderr() -> None:
    """From here on SIGUSR1 prints the stacks on stderr."""
    if HAS_SIGNAL and sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)


def file_of(folder: Path) -> Path:
    return folder / f"stacks-{rank()}.txt"


@contextmanager
def into(folder: Path) -> Iterator[Callable[[], None]]:
    """Within, SIGUSR1 writes the stacks into the folder's stacks-RANK.txt, then on stderr; yields what does the same.

    The file is written by the signal's handler itself, also where the interpreter is stuck; stderr comes when Python
    code runs again. What stays empty is removed.
    """
    file = file_of(folder)
    with file.open("a") as opened:

        def dump() -> None:
            faulthandler.dump_traceback(file=opened, all_threads=True)
            told()

        def told(*_: Any) -> None:
            heading = f"stacks of rank {rank()} at {time.strftime('%Y-%m-%d %H:%M:%S')}, in {activity.described()}"
            opened.write(f"^ {heading}\n\n")
            opened.flush()
            if sys.__stderr__ is not None:
                with contextlib.suppress(OSError, ValueError):
                    print(f"{heading}, also in {file}:", file=sys.__stderr__, flush=True)
                    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)

        with _registered(opened, told):
            yield dump
    if not file.stat().st_size:
        file.unlink()


@contextmanager
def _registered(opened: Any, told: Callable[..., None]) -> Iterator[None]:
    """faulthandler's handler writes into the file, then hands on to Python's, which only the main thread may set."""
    if not HAS_SIGNAL or threading.current_thread() is not threading.main_thread():
        yield
        return
    outside = bool(cast("Any", faulthandler).unregister(signal.SIGUSR1))  # its stub says that it returns nothing
    before = signal.signal(signal.SIGUSR1, told)
    faulthandler.register(signal.SIGUSR1, file=opened, all_threads=True, chain=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, before)
        if outside:
            to_stderr()
