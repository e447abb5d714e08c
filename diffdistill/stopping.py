"""SIGTERM and Ctrl-C during a run: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(BaseException):
    """Raised inside `StopSignal.at_once` when the signal comes."""


class StopSignal:
    """Within `watching`, SIGTERM and the first Ctrl-C are noted instead of ending the process; a second Ctrl-C
    interrupts. Outside the main thread, where Python takes no handlers, nothing is watched."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def status(self) -> int:
        """Exit status of a run ended by it: 0 after SIGTERM, which asked for nothing else, 130 after Ctrl-C."""
        return 130 if self.signal == signal.SIGINT else 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, the signal raises StopRequested: for long work whose loss costs nothing, such as evaluation."""
        if self.requested:
            raise StopRequested
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._at_once:
            raise StopRequested
