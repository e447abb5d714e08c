"""What the bench times: ours and its rivals on one problem of one batch and head, and how masks for it are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.kernels.attention import cpu, flex, gather
from diffdistill.kernels.attention.layout import BlockLayout, count
from diffdistill.kernels.attention.masks.asa import ASA
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.attention.masks.sparge import Sparge
from diffdistill.kernels.ordering import Grid

BLOCK = 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# made once, at the lowest density: from mean tokens (the dearest of these masks), and from 32 of 128 tokens
MASKS: dict[str, Mask] = {
    "mask of means": Sparge(theta=-0.1, density=0.1, order="raster"),
    "mask of samples": ASA(order="raster"),
}


@dataclass(frozen=True)
class Group:
    """Runs that are interleaved. dtype: bf16 | fp32.  direction: forward | backward.  rivals: beside ours."""

    length: int
    width: int
    dtype: str
    direction: str
    densities: tuple[float, ...]
    rivals: tuple[str, ...]

    @property
    def name(self) -> dict[str, Any]:
        return {"length": self.length, "width": self.width, "dtype": self.dtype, "direction": self.direction}


@dataclass(frozen=True)
class Runner:
    """name: ours | sdpa | flex | gather_sdpa | gather_bmm, or a mask's.  density: exact.  operations: on computed
    blocks, 0 for making a mask."""

    name: str
    density: float
    operations: float
    call: Callable[[], object]


def layout_of(length: int, density: float) -> BlockLayout:
    """Random blocks of 128 x 128, as many in every row: no baseline pads."""
    blocks = count(length, BLOCK)
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return BlockLayout.from_mask(order < max(1, round(density * blocks)), length, length, BLOCK, BLOCK)


def runners(group: Group) -> list[Runner]:
    """Dense attention once, the others per density; gathering everything is no contest, so not at density 1."""
    draw = torch.Generator().manual_seed(0)
    shape, dtype = (1, 1, group.length, group.width), DTYPES[group.dtype]
    q, k, v, d_o = (torch.randn(shape, generator=draw).to(dtype) for _ in range(4))
    per_score = (4 if group.direction == "forward" else 10) * group.width * group.length**2
    found = []
    for name in ("ours", *group.rivals):
        for density in (1.0,) if name == "sdpa" else group.densities:
            if name.startswith("gather") and density == 1:
                continue
            if name in MASKS and density > min(group.densities):
                continue
            layout = layout_of(group.length, density)
            call = _CALLS[group.direction, name](q, k, v, d_o, layout)
            found.append(Runner(name, layout.density, 0 if name in MASKS else per_score * layout.density, call))
    return found


def _ours(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    return lambda: cpu.forward(q, k, v, layout, q.shape[-1] ** -0.5, None)


def _ours_backward(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    scale = q.shape[-1] ** -0.5
    o, lse = cpu.forward(q, k, v, layout, scale, None)
    return lambda: cpu.backward(d_o, None, q, k, v, o, lse, layout, scale, None)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _sdpa_backward(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v)
    return lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    run = flex.prepared(layout)
    return lambda: run(q, k, v, q.shape[-1] ** -0.5)


def _gather_sdpa(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    return lambda: gather.attention(q, k, v, layout, q.shape[-1] ** -0.5)


def _gather_bmm(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    return lambda: list(_products(q, k, v, layout))


def _products(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Iterator[Tensor]:
    """Batched products in the tensors' own type over gathered keys: faster than fused attention in some shapes."""
    cut = gather.Blocked(layout, 1, 1, 1)
    queries, keys, values = cut.queries(q), cut.keys(k), cut.keys(v)
    for chunk in cut.chunks(None):
        rows = queries[chunk.rows] * q.shape[-1] ** -0.5
        weights = torch.bmm(rows, keys[chunk.blocks].flatten(1, 2).mT).softmax(-1)
        yield torch.bmm(weights, values[chunk.blocks].flatten(1, 2))


def _gather_bmm_backward(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
    scale = q.shape[-1] ** -0.5
    o, lse = gather.forward(q, k, v, layout, scale, None)
    return lambda: gather.backward(d_o, None, q, k, v, o, lse, layout, scale, None)


def _mask(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, BlockLayout], Callable[[], object]]:
    def prepared(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, layout: BlockLayout) -> Callable[[], object]:
        return lambda: MASKS[name].layout(q, k, Grid(1, 1, q.shape[2]), q.shape[-1] ** -0.5)

    return prepared


_CALLS: dict[tuple[str, str], Callable[[Tensor, Tensor, Tensor, Tensor, BlockLayout], Callable[[], object]]] = {
    ("forward", "ours"): _ours,
    ("forward", "sdpa"): _sdpa,
    ("forward", "flex"): _flex,
    ("forward", "gather_sdpa"): _gather_sdpa,
    ("forward", "gather_bmm"): _gather_bmm,
    **{("forward", name): _mask(name) for name in MASKS},
    ("backward", "ours"): _ours_backward,
    ("backward", "sdpa"): _sdpa_backward,
    ("backward", "gather_bmm"): _gather_bmm_backward,
}
