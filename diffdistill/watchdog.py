"""A thread that tells when training stands still: in which process, after which step, at what, for how long."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffdistill import activity
from diffdistill.errors import UserError
from diffdistill.logs import rank

log = logging.getLogger(__name__)
_LONGEST = 10.0  # seconds between two looks


class Watchdog:
    """seconds: without the end of a step, of one of its parts, or of an evaluation, save or export, after which it is
    told once, with the stacks of all threads; None or 0 is never.  exit_status: of the process, which then ends at once
    so that what started it can start it again; None goes on waiting.
    """

    def __init__(self, seconds: float | None = 1800.0, exit_status: int | None = None) -> None:
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise UserError("seconds", "must be >= 0, or null for never", seconds, "1800 is half an hour.")
        if exit_status is not None and not 1 <= exit_status <= 255:
            raise UserError("exit_status", "must lie in 1..255, or be null", exit_status, "75 says: try again later.")
        self.seconds, self.exit_status = seconds or None, exit_status

    @contextmanager
    def watching(self, dump: Callable[[], None]) -> Iterator[None]:
        """Within, a thread looks. dump: writes the stacks."""
        if self.seconds is None:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over, dump), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event, dump: Callable[[], None]) -> None:
        assert self.seconds is not None
        began, told = time.monotonic(), None
        while not over.wait(min(self.seconds / 4, _LONGEST)):
            moved = max(began, activity.moved())
            stood = time.monotonic() - moved
            if stood >= self.seconds and moved != told:
                told = moved
                self._tell(stood, dump)

    def _tell(self, stood: float, dump: Callable[[], None]) -> None:
        ends = "" if self.exit_status is None else f"; the process ends with status {self.exit_status}"
        log.warning(
            f"rank {rank()} has stood still for {stood:.3g} s in {activity.described()}; the stacks follow. "
            f"It hangs, or it is slow: watchdog.seconds={self.seconds:g} is the limit{ends}"
        )
        dump()
        if self.exit_status is not None:
            sys.stderr.flush()
            os._exit(self.exit_status)  # the main thread cannot be asked
