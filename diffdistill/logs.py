"""Logging through one place: what a process tells beside its results, with its rank where there are several.

Records of the logger `diffdistill` and of those below it go to stderr, one line each. By default the first process
tells what is at least an info, the others warnings. A run's progress and report are no records: they go to stdout
through `console`, by the first process alone.
Importing this file must stay cheap: the command line does it before anything else.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING

from .redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console

LEVELS = ("debug", "info", "warning", "error")
OPTION = "--log-level"
_LOGGER = logging.getLogger("diffdistill")


def rank() -> int:
    """Of this process among those that were started together, as torchrun and accelerate say it."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def begin(level: str | None = None) -> None:
    """Tell records on stderr. level: one of LEVELS; None is info for the first process, warning for the others."""
    _LOGGER.setLevel((level or ("info" if rank() == 0 else "warning")).upper())
    _LOGGER.propagate = False
    if not any(isinstance(handler, _Stderr) for handler in _LOGGER.handlers):
        _LOGGER.addHandler(_Stderr())


def console() -> Console:
    """For a run's progress and report: silent on other processes than the first, and from level warning on."""
    from rich.console import Console

    told = _LOGGER.level == logging.NOTSET or _LOGGER.isEnabledFor(logging.INFO)
    return Console(quiet=rank() > 0 or not told)


def lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run is gone, or does not answer in time."""
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # without importing it
    return world() > 1 and (of_torch or "gloo" in str(error).lower())


def tell_lost(error: BaseException) -> int:
    """Say so, by every process that is left: the first may be the one that is gone. Returns the exit status, 1."""
    told = re.sub(r"^\[[^\]]*\.\w+:\d+\] ", "", str(error).strip())  # without the place in gloo's sources
    first = re.split(r"\.\s|\n", told)[0] or type(error).__name__
    fix = "What was committed stands: start all of them again with resume=auto"
    _LOGGER.error(f"another process of this run has ended, or does not answer: {first[:200]}. {fix}")
    return 1


class _Stderr(logging.Handler):
    """One line per record on what is stderr at that moment, without secrets."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(line(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def line(record: logging.LogRecord) -> str:
    """`warning: text`; `[rank 1] warning: text` where there are several processes; debug lines have the time."""
    clock = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} " if record.levelno < logging.INFO else ""
    process = f"[rank {rank()}] " if world() > 1 else ""
    return f"{process}{record.levelname.lower()}: {clock}{redacted(record.getMessage())}"
