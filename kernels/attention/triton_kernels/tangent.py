"""The forward-mode kernel: tangents of output and LSE along those of q, k and v."""

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
def tangent_kernel(
    Q,
    K,
    V,
    QT,
    KT,
    VT,
    OUT,
    LSE,
    OT,
    LSET,
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
    qt_b,
    qt_h,
    qt_s,
    kt_b,
    kt_h,
    kt_s,
    vt_b,
    vt_h,
    vt_s,
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
    HAS_QT: tl.constexpr,
    HAS_KT: tl.constexpr,
    HAS_VT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """s'_ij = scale (q'_i.k_j + q_i.k'_j), L'_i = sum_j p_ij s'_ij, o'_i = sum_j p_ij (s'_ij v_j + v'_j) - L'_i o_i.

    For TILE_M queries of one batch and head. scale: times log2 e. OUT, LSE and the results are contiguous.
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
            if HAS_KT:
                KT += batch.to(tl.int64) * kt_b + kv_head.to(tl.int64) * kt_h
            if HAS_VT:
                VT += batch.to(tl.int64) * vt_b + kv_head.to(tl.int64) * vt_h
        if HAS_BIAS:
            BIAS += batch * bias_b + head * bias_h
        q = load_rows(Q, start, q_s, q_len, TILE_M, D, PAD_D, True)
        if HAS_QT:
            QT += batch.to(tl.int64) * qt_b + head.to(tl.int64) * qt_h
            q_dot = load_rows(QT, start, qt_s, q_len, TILE_M, D, PAD_D, True)
        query = both.to(tl.int64) * q_len
        at_row = start + tl.arange(0, TILE_M)
        lse = tl.load(LSE + query + at_row, mask=at_row < q_len, other=0.0)
        lse2 = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)
        total = tl.zeros([TILE_M, PAD_DV], tl.float32)
        lse_dot = tl.zeros([TILE_M], tl.float32)
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
                if HAS_QT or HAS_KT:
                    if HAS_QT:
                        s_dot = product(q_dot, tl.trans(k), PRECISION, UPCAST)
                    else:
                        s_dot = tl.zeros([TILE_M, TILE_N], tl.float32)
                    if HAS_KT:
                        k_dot = load_tile(KT, batch, kv_head, at, kt_s, end, TILE_N, D, PAD_D, hides, TMA)
                        s_dot = add_product(s_dot, q, tl.trans(k_dot), PRECISION, UPCAST)
                    moved = p * s_dot * (scale * 0.6931471805599453)
                    lse_dot += tl.sum(moved, 1)
                    total = add_product(total, moved.to(v.dtype), v, PRECISION, UPCAST)
                if HAS_VT:
                    v_dot = load_tile(VT, batch, kv_head, at, vt_s, end, TILE_N, DV, PAD_DV, hides, TMA)
                    total = add_product(total, p.to(v.dtype), v_dot, PRECISION, UPCAST)
        o = load_rows(OUT + query * DV, start, DV, q_len, TILE_M, DV, PAD_DV, True).to(tl.float32)
        store_rows(OT + query * DV, total - lse_dot[:, None] * o, start, DV, q_len, TILE_M, DV, PAD_DV, True)
        tl.store(LSET + query + at_row, lse_dot, mask=at_row < q_len)
