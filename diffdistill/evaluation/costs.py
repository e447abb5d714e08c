"""What a sampler costs: time of a call, and peak of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from diffdistill.data import Data
from diffdistill.denoiser import Cond
from diffdistill.memory import PeakBytes
from diffdistill.rng import Rng
from diffdistill.solvers import Sampler


def latency_ms(
    sampler: Sampler,
    data: Data,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
) -> float:
    """Median milliseconds of one call at this batch size, over 10 calls after 2, or fewer once they took 20 seconds."""
    seconds: list[float] = []
    for index in range(12):
        if len(seconds) > 2 and sum(seconds) > 20:
            break
        z, cond, rng = _call(data, batch_size, index, device, dtype)
        started = time.perf_counter()
        sampler.sample(z, cond, rng).cpu()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[2:])


def peak_bytes(
    sampler: Sampler,
    data: Data,
    weights: Iterable[Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
) -> int:
    """Peak memory of one call at this batch size, bytes.

    On a GPU what torch's allocator gave out. On the CPU the largest sum of live tensors, `weights` among them from the
    beginning: what native kernels take inside one operator is not seen.
    """
    z, cond, rng = _call(data, batch_size, 0, device, dtype)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        sampler.sample(z, cond, rng)
        return torch.cuda.max_memory_allocated(device)
    counter = PeakBytes(weights)
    with torch.no_grad(), counter:
        sampler.sample(z, cond, rng)
    return counter.peak


def _call(
    data: Data, batch_size: int, index: int, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Cond, Rng]:
    """Inputs of a call, other ones for each index."""
    rng = Rng(0, index, "latency", range(batch_size), device)
    return rng.normal((batch_size, *data.shape), dtype), data.conditions(rng), rng
