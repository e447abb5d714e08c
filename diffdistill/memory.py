"""Peak of live tensor bytes: counts storages as operators make and drop them. What the process holds in all."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdistill.shards import is_sharded, part


class PeakBytes(TorchDispatchMode):
    """Within the context, `peak` is the largest sum of live storages: those given at entry and all made since.

    Every operator goes through Python while it is on, so it is switched on for one step and removed.
    """

    def __init__(self, live: Iterable[Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()
        for tensor in live:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = (part(tensor) if is_sharded(tensor) else tensor).untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def optimizer_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """Every tensor an optimizer holds beyond the parameters."""
    return [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


@contextmanager
def freed_is_kept(device: torch.device | str) -> Iterator[None]:
    """Within the context `keep_freed` holds, on a CPU; afterwards what is free goes back to the system."""
    here = torch.device(device).type == "cpu" and keep_freed(True)
    try:
        yield
    finally:
        if here:
            keep_freed(False)
            ctypes.CDLL(None).malloc_trim(0)


def keep_freed(on: bool) -> bool:
    """Let glibc keep the memory of freed tensors for those to come, or give it back to the system beyond 64 MiB, as it
    does by itself. Pages that are taken anew are zeroed one by one, which was a quarter of a forward and backward pass
    of 100 M weights. Tensors above 32 MiB still go. Returns whether there is a glibc to be told.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes, to which it would come by itself
    return bool(kept and libc.mallopt(_TRIM_THRESHOLD, -1 if on else 64 * 2**20))


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def held() -> dict[str, int]:
    """Bytes of the process: `rss` and its peak, and of its current GPU, where there is one, what torch has allocated
    and reserved there, and the peak of the former. torch counts them itself: the device is not asked.
    """
    found = {}
    pages = Path("/proc/self/statm")
    if pages.is_file():  # Linux alone
        found["rss_bytes"] = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda_allocated_bytes"] = torch.cuda.memory_allocated()
        found["cuda_reserved_bytes"] = torch.cuda.memory_reserved()
        found["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found
