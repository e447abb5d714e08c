"""Random attention problems, for the tests of kernels and networks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffdistill.kernels.attention import api, reference
from diffdistill.kernels.attention.layout import BlockLayout, count


@dataclass(frozen=True)
class Case:
    """Sizes of one problem. lists: leading dimensions of the mask.  bias: of key_bias, None for none."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 256
    kv_len: int = 256
    width: int = 64
    v_width: int = 64
    block_q: int = 64
    block_k: int = 64
    density: float = 0.5
    lists: tuple[int, int] = (1, 1)
    bias: tuple[int, int] | None = None
    valid: bool = False
    interleaved: bool = False  # tensors laid out [B, S, H, D]

    @property
    def scale(self) -> float:
        return self.width**-0.5


CASES = {
    "plain": Case(),
    "ragged": Case(batch=2, q_len=200, kv_len=333, block_q=64, block_k=128, lists=(2, 2)),
    "grouped heads": Case(heads=4, kv_heads=2, lists=(1, 4), block_q=128, q_len=300, width=128, v_width=128),
    "bias": Case(batch=2, bias=(2, 1), kv_len=190, lists=(2, 1)),
    "bias per head": Case(heads=4, kv_heads=1, bias=(1, 4), valid=True, kv_len=320),
    "valid counts": Case(valid=True, kv_len=300, block_k=128, q_len=100),
    "odd widths": Case(width=40, v_width=72, q_len=130, kv_len=129),
    "interleaved": Case(batch=2, heads=4, kv_heads=2, interleaved=True, q_len=192, kv_len=257, lists=(2, 4)),
    "dense": Case(density=1.0, q_len=150, kv_len=150),
    "one token": Case(q_len=1, kv_len=1, density=1.0),
    "nothing on": Case(density=0.0),
}


def layout_of(case: Case, seed: int = 0) -> BlockLayout:
    """A random mask with an empty and a full row where there are several."""
    draw = torch.Generator().manual_seed(seed)
    shape = (*case.lists, count(case.q_len, case.block_q), count(case.kv_len, case.block_k))
    mask = torch.rand(shape, generator=draw) < case.density
    if 0 < case.density < 1 and shape[2] > 2:
        mask[0, 0, 1], mask[-1, -1, 2] = False, True
    valid = None
    if case.valid:
        most = [min(case.block_k, case.kv_len - j * case.block_k) for j in range(shape[3])]
        valid = torch.tensor([m - 7 * (j % 3) if j != 1 else 0 for j, m in enumerate(most)], dtype=torch.int32)
    return BlockLayout.from_mask(mask, case.q_len, case.kv_len, case.block_q, case.block_k, valid)


def tensors_of(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a case."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(heads: int, length: int, width: int) -> Tensor:
        if case.interleaved:
            return torch.randn(case.batch, length, heads, width, generator=draw).to(dtype).transpose(1, 2)
        return torch.randn(case.batch, heads, length, width, generator=draw).to(dtype)

    return (
        tensor(case.heads, case.q_len, case.width),
        tensor(case.kv_heads, case.kv_len, case.width),
        tensor(case.kv_heads, case.kv_len, case.v_width),
    )


def bias_of(case: Case, seed: int = 0) -> Tensor | None:
    """A key bias that hides every fifth key."""
    if case.bias is None:
        return None
    bias = torch.randn(*case.bias, case.kv_len, generator=torch.Generator().manual_seed(seed))
    bias[..., ::5] = -torch.inf
    return bias


def oracle(case: Case, layout: BlockLayout, tensors: tuple[Tensor, ...], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    return reference.attention(*tensors, layout, case.scale, bias)


def finite(lse: Tensor) -> Tensor:
    """LSE with 0 for queries without keys."""
    return torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)


def skip_unless(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip, with the reason, where the native kernel does not run."""
    if backend == "cpu":
        x = torch.zeros(1, 1, 1, 64, dtype=dtype)
        reason = api.explain(x, x, x, BlockLayout.full(1, 1)).refused.get("cpu")
        if reason is not None:
            pytest.skip(f"cpu: {reason}")
