"""What the kernels share: products, loads of tiles, and the reading of index lists.

UPCAST is set only under Triton's interpreter, whose product of bfloat16 multiplies raw integers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + a @ b in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_rows(
    base, start, stride, end, TILE: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr
):
    """[TILE, PAD] of the rows start .. start + TILE; MASKED: 0 from row `end` on. Columns beyond WIDTH are 0."""
    row = tl.arange(0, TILE)
    column = tl.arange(0, PAD)
    at = base + start.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    if MASKED:
        keep = (start + row < end)[:, None]
        if WIDTH != PAD:
            keep = keep & (column < WIDTH)[None, :]
        return tl.load(at, mask=keep, other=0.0)
    if WIDTH != PAD:
        return tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def load_tile(
    X,
    batch,
    head,
    start,
    stride,
    end,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """`load_rows` in a loop. TMA: X describes the whole tensor for the copy engine, which fills with 0 beyond its ends;
    else it points to the head's first row."""
    if TMA:
        return X.load([batch, head, start, 0]).reshape(TILE, PAD)
    else:
        return load_rows(X, start, stride, end, TILE, WIDTH, PAD, MASKED)


@triton.jit
def store_rows(
    base, values, start, stride, end, TILE: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr
):
    """Inverse of `load_rows`."""
    row = tl.arange(0, TILE)
    column = tl.arange(0, PAD)
    at = base + start.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    values = values.to(base.dtype.element_ty)
    if MASKED:
        keep = (start + row < end)[:, None]
        if WIDTH != PAD:
            keep = keep & (column < WIDTH)[None, :]
        tl.store(at, values, mask=keep)
    elif WIDTH != PAD:
        tl.store(at, values, mask=(column < WIDTH)[None, :])
    else:
        tl.store(at, values)


@triton.jit
def end_of_keys(VALID, block, kv_len, BLOCK_K: tl.constexpr, HAS_VALID: tl.constexpr):
    """One past the last key of `block` that exists."""
    if HAS_VALID:
        return block * BLOCK_K + tl.load(VALID + block)
    return kv_len


@triton.jit
def masked_scores(scores, BIAS, start, end, TILE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Base-2 logits [.., TILE] of the keys from `start` on with their bias, -inf from key `end` on."""
    key = start + tl.arange(0, TILE)
    if HAS_BIAS:
        bias = tl.load(BIAS + key, mask=key < end, other=0.0) * 1.4426950408889634
        scores += bias[None, :]
    return tl.where((key < end)[None, :], scores, -float("inf"))


@triton.jit
def whole_blocks(IDX, count, num_k, RAGGED: tl.constexpr, MASKED: tl.constexpr):
    """How many of a list's blocks need no mask: lists ascend, so a ragged block can only come last."""
    if MASKED:
        return 0
    if RAGGED:
        last = tl.load(IDX + tl.maximum(count - 1, 0))
        return tl.where((count > 0) & (last == num_k - 1), count - 1, count)
    return count
