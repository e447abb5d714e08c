"""Kernels for masks that depend on the tokens: means of blocks, and scores between blocks without the matrix between
tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from diffdistill.kernels.attention.triton_kernels.tiles import load_rows, product


@triton.jit
def means_kernel(
    X,
    OUT,
    VALID,
    x_b,
    x_h,
    x_s,
    heads,
    length,
    blocks,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """The mean in float32 of the tokens of one block that exist, 0 if none does. OUT is contiguous."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    block = tl.program_id(0)
    start = block * BLOCK
    end = length
    if HAS_VALID:
        end = start + tl.load(VALID + block)
    X += batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h
    x = load_rows(X, start, x_s, end, BLOCK, D, PAD_D, True).to(tl.float32)
    count = tl.maximum(tl.minimum(end - start, BLOCK), 1)
    column = tl.arange(0, PAD_D)
    at = OUT + (tl.program_id(1).to(tl.int64) * blocks + block) * D + column
    tl.store(at, tl.sum(x, 0) / count, mask=column < D)


@triton.jit
def scores_kernel(
    Q,
    K,
    OUT,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    heads,
    group,
    q_rows,
    k_rows,
    scale,
    TOKENS_Q: tl.constexpr,
    TOKENS_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    PEAK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores of TILE_M // TOKENS_Q query blocks with every key block, in two sweeps over the keys.

    The first finds each query's sum (PEAK: its maximum); the second reduces the weights within blocks of TOKENS_K keys,
    then of TOKENS_Q queries: by sum and mean, or PEAK: by maxima. scale: times log2 e, positive. OUT is contiguous.
    """
    M_BLOCKS: tl.constexpr = TILE_M // TOKENS_Q
    N_BLOCKS: tl.constexpr = TILE_N // TOKENS_K
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    start = tl.program_id(0) * TILE_M
    Q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    K += batch.to(tl.int64) * k_b + (head // group).to(tl.int64) * k_h
    q = load_rows(Q, start, q_s, q_rows, TILE_M, D, PAD_D, True)
    key = tl.arange(0, TILE_N)
    highest = tl.full([TILE_M], -float("inf"), tl.float32)
    weight = tl.zeros([TILE_M], tl.float32)
    for at in range(0, k_rows, TILE_N):
        k = load_rows(K, tl.cast(at, tl.int32), k_s, k_rows, TILE_N, D, PAD_D, True)
        scores = product(q, tl.trans(k), PRECISION, UPCAST) * scale
        scores = tl.where((at + key < k_rows)[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        if not PEAK:
            weight = weight * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        highest = higher
    reference = highest if PEAK else highest + tl.log2(weight)
    blocks_k = k_rows // TOKENS_K
    block_q = start // TOKENS_Q + tl.arange(0, M_BLOCKS)
    OUT += tl.program_id(1).to(tl.int64) * (q_rows // TOKENS_Q) * blocks_k
    for at in range(0, k_rows, TILE_N):
        k = load_rows(K, tl.cast(at, tl.int32), k_s, k_rows, TILE_N, D, PAD_D, True)
        scores = product(q, tl.trans(k), PRECISION, UPCAST) * scale
        weights = tl.exp2(scores - reference[:, None]).reshape(M_BLOCKS, TOKENS_Q, N_BLOCKS, TOKENS_K)
        if PEAK:
            pooled = tl.max(tl.max(weights, 3), 1)
        else:
            pooled = tl.sum(tl.sum(weights, 3), 1) / TOKENS_Q
        block_k = at // TOKENS_K + tl.arange(0, N_BLOCKS)
        inside = (block_q * TOKENS_Q < q_rows)[:, None] & (block_k < blocks_k)[None, :]
        tl.store(OUT + block_q[:, None] * blocks_k + block_k[None, :], pooled, mask=inside)
