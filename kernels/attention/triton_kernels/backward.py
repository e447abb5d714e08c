"""The backward kernels: what both passes read of each query, then dq by query tile and dk, dv by key tile.

Each program owns the rows that it writes: no atomics, the same bits in every run. Both passes compute the weights
p_ij = 2^(s_ij - L_i) and ds_ij = p_ij (do_i.v_j - delta_i) again.
"""

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
def delta_kernel(
    DO,
    OUT,
    LSE,
    DLSE,
    DELTA,
    LSE2,
    do_b,
    do_h,
    do_s,
    heads,
    q_len,
    TILE_M: tl.constexpr,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta_i = do_i.o_i - dL_i, and L in base 2, +inf for a query without keys, whose weights are then 0."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    start = tl.program_id(0) * TILE_M
    query = tl.program_id(1).to(tl.int64) * q_len
    DO += batch.to(tl.int64) * do_b + head.to(tl.int64) * do_h
    d_o = load_rows(DO, start, do_s, q_len, TILE_M, DV, PAD_DV, True).to(tl.float32)
    o = load_rows(OUT + query * DV, start, DV, q_len, TILE_M, DV, PAD_DV, True).to(tl.float32)
    delta = tl.sum(d_o * o, 1)
    row = start + tl.arange(0, TILE_M)
    inside = row < q_len
    if HAS_DLSE:
        delta -= tl.load(DLSE + query + row, mask=inside, other=0.0)
    lse = tl.load(LSE + query + row, mask=inside, other=0.0)
    lse2 = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(DELTA + query + row, delta, mask=inside)
    tl.store(LSE2 + query + row, lse2, mask=inside)


@triton.jit
def dq_kernel(
    Q,
    K,
    V,
    DO,
    LSE2,
    DELTA,
    DQ,
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
    do_b,
    do_h,
    do_s,
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
    """dq of TILE_M queries of one batch and head. scale: times log2 e. DQ is contiguous."""
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
        DO += batch.to(tl.int64) * do_b + head.to(tl.int64) * do_h
        if HAS_BIAS:
            BIAS += batch * bias_b + head * bias_h
        q = load_rows(Q, start, q_s, q_len, TILE_M, D, PAD_D, True)
        d_o = load_rows(DO, start, do_s, q_len, TILE_M, DV, PAD_DV, True)
        query = both.to(tl.int64) * q_len
        at_row = start + tl.arange(0, TILE_M)
        lse2 = tl.load(LSE2 + query + at_row, mask=at_row < q_len, other=float("inf"))
        delta = tl.load(DELTA + query + at_row, mask=at_row < q_len, other=0.0)
        dq = tl.zeros([TILE_M, PAD_D], tl.float32)
        whole = whole_blocks(IDX, count, num_k, RAGGED, MASKED)
        for hides in tl.static_range(1 if MASKED else 0, 2 if MASKED or RAGGED else 1):
            first = whole * STEPS if hides else 0
            last = count * STEPS if hides else whole * STEPS
            for i in range(first, last):
                block = tl.load(IDX + i // STEPS)
                at = block * BLOCK_K + i % STEPS * TILE_N
                end = end_of_keys(VALID, block, kv_len, BLOCK_K, HAS_VALID)
                k = load_tile(K, batch, kv_head, at, k_s, end, TILE_N, D, PAD_D, hides, TMA)
                v = load_tile(V, batch, kv_head, at, v_s, end, TILE_N, DV, PAD_DV, hides, TMA)
                scores = product(q, tl.trans(k), PRECISION, UPCAST) * scale
                if hides:
                    scores = masked_scores(scores, BIAS, at, end, TILE_N, HAS_BIAS)
                p = tl.exp2(scores - lse2[:, None])
                dp = product(d_o, tl.trans(v), PRECISION, UPCAST)
                ds = p * (dp - delta[:, None])
                dq = add_product(dq, ds.to(k.dtype), k, PRECISION, UPCAST)
        dq *= scale * 0.6931471805599453
        store_rows(DQ + query * D, dq, start, D, q_len, TILE_M, D, PAD_D, True)


@triton.jit
def dkv_kernel(
    Q,
    K,
    V,
    DO,
    LSE2,
    DELTA,
    DK,
    DV_OUT,
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
    do_b,
    do_h,
    do_s,
    list_b,
    list_h,
    idx_row,
    bias_b,
    bias_h,
    kv_heads,
    group,
    q_len,
    kv_len,
    num_q,
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
    """dk and dv of TILE_N keys of one batch and key head, summed over its group of query heads in their order.

    NUM, IDX, ORDER: the transposed lists, query blocks per key block.  RAGGED: of the queries.  scale: times log2 e.
    """
    SPLIT: tl.constexpr = BLOCK_K // TILE_N
    STEPS: tl.constexpr = BLOCK_Q // TILE_M
    heads = kv_heads * group
    rows = tl.cdiv(kv_len, BLOCK_K)
    place = tl.load(ORDER + tl.program_id(0) // SPLIT)
    both, row = place // rows, place % rows
    batch, kv_head = both // kv_heads, both % kv_heads
    start = row * BLOCK_K + tl.program_id(0) % SPLIT * TILE_N
    if start < kv_len:
        K += batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
        V += batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
        end = end_of_keys(VALID, row, kv_len, BLOCK_K, HAS_VALID)
        k = load_rows(K, start, k_s, end, TILE_N, D, PAD_D, True)
        v = load_rows(V, start, v_s, end, TILE_N, DV, PAD_DV, True)
        dk = tl.zeros([TILE_N, PAD_D], tl.float32)
        dv = tl.zeros([TILE_N, PAD_DV], tl.float32)
        at_key = start + tl.arange(0, TILE_N)
        for member in range(group):
            head = kv_head * group + member
            lists = batch * list_b + head * list_h
            count = tl.load(NUM + lists + row)
            blocks = IDX + (lists + row).to(tl.int64) * idx_row
            queries, gradients = Q, DO
            if not TMA:
                queries += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
                gradients += batch.to(tl.int64) * do_b + head.to(tl.int64) * do_h
            query = (batch * heads + head).to(tl.int64) * q_len
            if HAS_BIAS:
                bias = tl.load(BIAS + batch * bias_b + head * bias_h + at_key, mask=at_key < end, other=0.0)
                bias *= 1.4426950408889634
            whole = whole_blocks(blocks, count, num_q, RAGGED, False)
            for hides in tl.static_range(0, 2 if RAGGED else 1):
                first = whole * STEPS if hides else 0
                last = count * STEPS if hides else whole * STEPS
                for i in range(first, last):
                    at = tl.load(blocks + i // STEPS) * BLOCK_Q + i % STEPS * TILE_M
                    at_row = at + tl.arange(0, TILE_M)
                    q = load_tile(queries, batch, head, at, q_s, q_len, TILE_M, D, PAD_D, hides, TMA)
                    if hides:
                        lse2 = tl.load(LSE2 + query + at_row, mask=at_row < q_len, other=float("inf"))
                        delta = tl.load(DELTA + query + at_row, mask=at_row < q_len, other=0.0)
                    else:
                        lse2 = tl.load(LSE2 + query + at_row)
                        delta = tl.load(DELTA + query + at_row)
                    scores = product(k, tl.trans(q), PRECISION, UPCAST) * scale
                    if HAS_BIAS:
                        scores += bias[:, None]
                    p = tl.exp2(scores - lse2[None, :])
                    d_o = load_tile(gradients, batch, head, at, do_s, q_len, TILE_M, DV, PAD_DV, hides, TMA)
                    dv = add_product(dv, p.to(d_o.dtype), d_o, PRECISION, UPCAST)
                    dp = product(v, tl.trans(d_o), PRECISION, UPCAST)
                    ds = p * (dp - delta[None, :])
                    dk = add_product(dk, ds.to(q.dtype), q, PRECISION, UPCAST)
        exists = (at_key < end)[:, None]
        dk = tl.where(exists, dk * (scale * 0.6931471805599453), 0.0)
        dv = tl.where(exists, dv, 0.0)
        key = both.to(tl.int64) * kv_len
        store_rows(DK + key * D, dk, start, D, kv_len, TILE_N, D, PAD_D, True)
        store_rows(DV_OUT + key * DV, dv, start, DV, kv_len, TILE_N, DV, PAD_DV, True)
