"""The forward kernel: one program per tile of queries, over the key blocks of its list, with a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from diffdistill.kernels.attention.triton_kernels.tiles import (
    add_product,
    end_of_keys,
    load_rows,
    load_tile,
    masked_scores,
    product,
    store_rows,
    whole_blocks,
)


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    NUM,
    IDX,
    ORDER,
    VALID,
    BIAS,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    list_b,
    list_h,
    idx_row,
    bias_b,
    bias_h,
    heads,
    group,
    q_len,
    kv_len,
    num_k,
    scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """Output and natural LSE of TILE_M queries of one batch and head.

    scale: of the logits, times log2 e, positive.  list_b, list_h: in rows of the lists.  OUT and LSE are contiguous.
    """
    SPLIT: tl.constexpr = BLOCK_Q // TILE_M
    STEPS: tl.constexpr = BLOCK_K // TILE_N
    MASKED: tl.constexpr = HAS_VALID or HAS_BIAS
    rows = tl.cdiv(q_len, BLOCK_Q)
    place = tl.load(ORDER + tl.program_id(0) // SPLIT)
    both, row = place // rows, place % rows
    batch, head = both // heads, both % heads
    kv_head = head // group
    lists = batch * list_b + head * list_h
    start = row * BLOCK_Q + tl.program_id(0) % SPLIT * TILE_M
    if start < q_len:
        count = tl.load(NUM + lists + row)
        IDX += (lists + row).to(tl.int64) * idx_row
        Q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
        if not TMA:
            K += batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
            V += batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
        if HAS_BIAS:
            BIAS += batch * bias_b + head * bias_h
        q = load_rows(Q, start, q_s, q_len, TILE_M, D, PAD_D, True)
        total = tl.zeros([TILE_M, PAD_DV], tl.float32)
        weight = tl.zeros([TILE_M], tl.float32)
        highest = tl.full([TILE_M], -float("inf"), tl.float32)
        whole = whole_blocks(IDX, count, num_k, RAGGED, MASKED)
        for hides in tl.static_range(1 if MASKED else 0, 2 if MASKED or RAGGED else 1):
            first = whole * STEPS if hides else 0
            last = count * STEPS if hides else whole * STEPS
            for i in range(first, last):
                block = tl.load(IDX + i // STEPS)
                at = block * BLOCK_K + i % STEPS * TILE_N
                end = end_of_keys(VALID, block, kv_len, BLOCK_K, HAS_VALID)
                k = load_tile(K, batch, kv_head, at, k_s, end, TILE_N, D, PAD_D, hides, TMA)
                scores = product(q, tl.trans(k), PRECISION, UPCAST)
                if hides:
                    scores = masked_scores(scores * scale, BIAS, at, end, TILE_N, HAS_BIAS)
                    higher = tl.maximum(highest, tl.max(scores, 1))
                    reference = tl.where(higher == -float("inf"), 0.0, higher)  # no key so far
                    p = tl.exp2(scores - reference[:, None])
                else:
                    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
                    reference = higher
                    p = tl.exp2(scores * scale - reference[:, None])
                shrink = tl.exp2(highest - reference)
                weight = weight * shrink + tl.sum(p, 1)
                total = total * shrink[:, None]
                v = load_tile(V, batch, kv_head, at, v_s, end, TILE_N, DV, PAD_DV, hides, TMA)
                total = add_product(total, p.to(v.dtype), v, PRECISION, UPCAST)
                highest = higher
        some = tl.where(weight == 0.0, 1.0, weight)
        total = total / some[:, None]
        lse = tl.where(weight == 0.0, -float("inf"), (highest + tl.log2(some)) * 0.6931471805599453)
        query = both.to(tl.int64) * q_len
        store_rows(OUT + query * DV, total, start, DV, q_len, TILE_M, DV, PAD_DV, True)
        at_row = start + tl.arange(0, TILE_M)
        tl.store(LSE + query + at_row, lse, mask=at_row < q_len)
