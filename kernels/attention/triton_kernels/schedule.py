"""What the kernels read beside a layout's lists: the order of their programs and the transposed lists.

Computed without waiting for the GPU, and once per layout: lists are known by their tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from diffdistill.kernels.attention.layout import BlockLayout

OUTLIER = 2  # a row this many times as long as the mean one starts before all others


@dataclass(frozen=True)
class Schedule:
    """One kind of rows. num: int32 [B|1, H|1, n].  idx: int32 [B|1, H|1, n, max].  order: int32 [B * H * n], the places
    (batch * H + head) * n + row in the order in which programs start."""

    num: Tensor
    idx: Tensor
    order: Tensor

    @classmethod
    def of(cls, num: Tensor, idx: Tensor, batch: int, heads: int) -> Schedule:
        """heads: over which programs go; where lists have more, a program works through those of its group."""
        lengths = num.expand(batch, -1, -1)
        lengths = lengths.expand(-1, heads, -1) if num.shape[1] == 1 else lengths.unflatten(1, (heads, -1)).sum(2)
        return cls(num, idx, start_order(lengths))


def start_order(lengths: Tensor) -> Tensor:
    """Order of programs, int32 [B * H * n], for rows of `lengths` [B, H, n].

    Head after head, so that its keys stay in the second cache, longest first within each, so that short ones fill
    the end of a launch; rows far longer than the mean start before all: in the last head one would outlast the rest.
    """
    flat = lengths.flatten(0, 1).long()
    outlier = flat > OUTLIER * flat.double().mean()
    longest = flat.amax() + 1
    head = torch.arange(1, len(flat) + 1, device=flat.device)[:, None]
    rank = torch.where(outlier, 0, head) * longest + (longest - flat)
    return rank.flatten().argsort(stable=True).to(torch.int32)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def of_queries(layout: BlockLayout, batch: int, heads: int) -> Schedule:
    """Key blocks per query block."""
    lists = layout.kv_num, layout.kv_idx
    return _once(layout, ("queries", batch, heads), lambda: Schedule.of(*lists, batch, heads))


def of_keys(layout: BlockLayout, batch: int, heads: int) -> Schedule:
    """Query blocks per key block. heads: of keys."""
    return _once(layout, ("keys", batch, heads), lambda: Schedule.of(*layout.transposed(), batch, heads))


def _once(layout: BlockLayout, kind: tuple[str, int, int], make: Callable[[], Schedule]) -> Schedule:
    if layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make()  # what a graph's pool holds is not filled before its replay
    held = _known.setdefault(layout.kv_idx, {})
    versions = layout.kv_num._version, layout.kv_idx._version, layout.num_k
    if kind not in held or held[kind][0] != versions:
        held[kind] = versions, make()
    return held[kind][1]
