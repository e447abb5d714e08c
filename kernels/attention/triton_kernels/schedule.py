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


@dataclass(frozen=True)
class Schedule:
    """One kind of rows. num: int32 [B|1, H|1, n].  idx: int32 [B|1, H|1, n, max].  order: int32 like num, the rows of
    each head, longest first, so that short ones fill the end of a launch."""

    num: Tensor
    idx: Tensor
    order: Tensor

    @classmethod
    def of(cls, num: Tensor, idx: Tensor) -> Schedule:
        return cls(num, idx, num.argsort(stable=True, dim=-1, descending=True).to(torch.int32))


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def of_queries(layout: BlockLayout) -> Schedule:
    """Key blocks per query block."""
    return _once(layout, "queries", lambda: Schedule.of(layout.kv_num, layout.kv_idx))


def of_keys(layout: BlockLayout) -> Schedule:
    """Query blocks per key block."""
    return _once(layout, "keys", lambda: Schedule.of(*layout.transposed()))


def _once(layout: BlockLayout, kind: str, make: Callable[[], Schedule]) -> Schedule:
    if layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make()  # what a graph's pool holds is not filled before its replay
    held = _known.setdefault(layout.kv_idx, {})
    versions = layout.kv_num._version, layout.kv_idx._version, layout.num_k
    if kind not in held or held[kind][0] != versions:
        held[kind] = versions, make()
    return held[kind][1]
