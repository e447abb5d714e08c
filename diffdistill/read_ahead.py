"""Batches that come from files, made by threads while earlier ones are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import torch

from diffdistill.data import Data
from diffdistill.distillers.base import Batch
from diffdistill.rng import Rng


class ReadAhead:
    """Data whose batches of the next `steps` steps, up to step `last`, are being made when one is asked for.

    A batch is made of its stream alone, so it is the same whoever makes it and when. What goes wrong is told where that
    batch is asked for. `begun` is what threads have been given and nobody has asked for yet.
    """

    def __init__(self, data: Data, steps: int, last: int) -> None:
        self.data, self.steps, self.last = data, steps, last
        self.threads = ThreadPoolExecutor(steps, "data")
        self.begun: dict[tuple[int, int, int], Future[Batch]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        """As the data's, of the stream of a micro-batch from its first draw."""
        asked = self.begun.pop(_place(rng), None)
        for step in range(rng.step + 1, min(rng.step + self.steps, self.last) + 1):
            next_one = rng.at(step)
            if _place(next_one) not in self.begun:
                make = self.threads.submit(self.data.batch, next_one, global_batch, needs, dtype)
                self.begun[_place(next_one)] = make
        return self.data.batch(rng, global_batch, needs, dtype) if asked is None else asked.result()


def _place(rng: Rng) -> tuple[int, int, int]:
    return rng.step, int(rng.ids[0]), len(rng)


@contextmanager
def reading_ahead(data: Data, steps: int, last: int) -> Iterator[Data]:
    """Within the context, the data by `ReadAhead` where its batches come from files and steps > 0, else as it is."""
    if not steps or not getattr(data, "from_files", False):
        yield data
        return
    ahead = ReadAhead(data, steps, last)
    try:
        yield cast("Data", ahead)
    finally:
        ahead.threads.shutdown(cancel_futures=True)
