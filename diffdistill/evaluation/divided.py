"""Samples drawn by all processes of a run: each makes its share of the batches, the main one has them in order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill import ranks
from diffdistill.data import Data
from diffdistill.solvers import Sampler

from . import harness


def draw(
    sampler: Sampler,
    data: Data,
    num_samples: int,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    between: Callable[[], None],
) -> tuple[Tensor, Tensor | None] | None:
    """What `harness.draw` gives, on the main process, batch by batch the same; None on the others.

    between: called before each batch, on all processes at once; what it raises ends the drawing.
    """

    def made(first: int) -> dict[str, Tensor]:
        between()
        num = min(batch_size, num_samples - first)
        samples, labels = harness.draw(sampler, data, num, seed, batch_size, device, dtype, first=first)
        return {"samples": samples} if labels is None else {"samples": samples, "labels": labels}

    found = ranks.divided(range(0, num_samples, batch_size), made)
    if found is None:
        return None
    whole = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return whole["samples"], whole.get("labels")
