"""Rows on disk: written a thousand at a time in their place, so that any number of processes fill one file.

What was written stays: a measurement that was cut short goes on, and who wrote a row does not show in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from diffdistill.errors import UserError

from .rows import Rows

SHARD = 1000  # samples that are written at once: the unit of work


class RowStore:
    """Rows of `size` samples in `folder`. card: JSON values that decide them; rows of another card are refused.

    folder/card.json, folder/<column>.npy, folder/done/<number of the shard>.
    """

    def __init__(self, folder: Path, size: int, card: Mapping[str, Any], key: str = "work") -> None:
        self._folder, self._size = folder, size
        (folder / "done").mkdir(parents=True, exist_ok=True)
        ours = json.loads(json.dumps({"size": size, "shard": SHARD, **card}))
        with FileLock(folder / ".lock"):
            file = folder / "card.json"
            if not file.is_file():
                _write_text(file, json.dumps(ours, indent=1) + "\n")
        theirs = json.loads(file.read_text())
        for name in dict.fromkeys([*theirs, *ours]):
            if theirs.get(name) != ours.get(name):
                fix = "Name another folder, or remove this one."
                constraint = f"must hold rows of this measurement: {name} is {theirs.get(name)!r} in {folder}"
                raise UserError(key, constraint, repr(ours.get(name)), fix)

    def shards(self, rank: int = 0, world: int = 1) -> list[range]:
        """The numbers that are still to be made, for this one of `world` processes, a shard each."""
        starts = range(0, self._size, SHARD)
        mine = [range(start, min(start + SHARD, self._size)) for start in starts][rank::world]
        return [ids for ids in mine if not self._marker(ids).is_file()]

    def write(self, ids: range, rows: Rows) -> None:
        """Put the rows of a shard in their place; it counts as done when all are on the disk."""
        for name, values in rows.items():
            array = self._array(name, values)
            array[ids.start : ids.stop] = values.numpy()
            array.flush()
        _write_text(self._marker(ids), "")

    def rows(self) -> Rows:
        """All rows, read from the files when they are looked at."""
        assert not self.shards(), "filled first"
        files = sorted(self._folder.glob("*.npy"))
        # copy on write: torch wants memory that it could write
        return {file.stem: torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False)) for file in files}

    def _array(self, name: str, values: Tensor) -> np.memmap:
        file = self._folder / f"{name}.npy"
        with FileLock(self._folder / ".lock"):
            if not file.is_file():
                aside = file.with_suffix(f".{os.getpid()}")
                shape = (self._size, *values.shape[1:])
                np.lib.format.open_memmap(aside, "w+", values.numpy().dtype, shape).flush()
                aside.replace(file)
        return np.load(file, mmap_mode="r+", allow_pickle=False)

    def _marker(self, ids: range) -> Path:
        return self._folder / "done" / f"{ids.start // SHARD:06d}"


def _write_text(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(file)
