"""Block-sparse attention in plain torch: gather the key blocks that a row of query blocks reads, then batched products.

Runs on every device and in every floating type: what the rule takes where no kernel of our own runs, and the strong
torch-only baseline of the bench. Rows of equal length go together, so that few are padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.autodiff import numbers
from diffdistill.kernels.attention.layout import BlockLayout

SCORES = 2**24  # of one chunk: 64 MiB in float32


@dataclass(frozen=True)
class Chunk:
    """Rows of query blocks that are computed together.

    rows: int64 [R] into B * Hq * nQ.  blocks: int64 [R, n] into B * Hkv * nK, padded ones anything.
    mask: bool or float [R, 1, n * block_k], which keys exist, or their bias; None: all, without one.
    """

    rows: Tensor
    blocks: Tensor
    mask: Tensor | None


class Blocked:
    """Tensors cut into the layout's blocks. q and what is shaped like it by query block, k and v by key block."""

    def __init__(self, layout: BlockLayout, batch: int, heads: int, kv_heads: int) -> None:
        self.layout, self.batch, self.heads, self.kv_heads = layout, batch, heads, kv_heads

    def queries(self, x: Tensor) -> Tensor:
        """[B, Hq, Sq, D] -> [B * Hq * nQ, block_q, D], the last block filled with 0."""
        return _cut(x, self.layout.num_q, self.layout.block_q)

    def keys(self, x: Tensor) -> Tensor:
        """[B, Hkv, Skv, D] -> [B * Hkv * nK, block_k, D], likewise; slots without a key are 0 too."""
        if self.layout.kv_valid is not None:
            x = x.masked_fill(~self.layout.valid_keys()[:, None], 0)
        return _cut(x, self.layout.num_k, self.layout.block_k)

    def uncut_queries(self, x: Tensor) -> Tensor:
        """Inverse of `queries`."""
        return x.view(self.batch, self.heads, -1, x.shape[-1])[:, :, : self.layout.q_len]

    def uncut_keys(self, x: Tensor) -> Tensor:
        """Inverse of `keys`."""
        return x.view(self.batch, self.kv_heads, -1, x.shape[-1])[:, :, : self.layout.kv_len]

    def chunks(self, key_bias: Tensor | None) -> Iterator[Chunk]:
        """Rows that read a block, longest first."""
        layout = self.layout
        shape = (self.batch, self.heads, layout.num_q)
        num = layout.kv_num.expand(shape).flatten()
        idx = layout.kv_idx.expand(*shape, -1).flatten(0, 2)
        order = num.argsort(descending=True, stable=True)
        counts = numbers(num[order])
        bias = self._bias(key_bias)
        start, end = 0, sum(n > 0 for n in counts)
        while start < end:
            n = counts[start]
            rows = order[start : min(end, start + max(1, SCORES // (n * layout.block_k * layout.block_q)))]
            start += len(rows)
            yield self._chunk(rows, idx[rows, :n].long(), num[rows], bias)

    def _chunk(self, rows: Tensor, idx: Tensor, num: Tensor, bias: Tensor | None) -> Chunk:
        head, batch = rows // self.layout.num_q % self.heads, rows // self.layout.num_q // self.heads
        kv_head = batch * self.kv_heads + head // (self.heads // self.kv_heads)
        blocks = kv_head[:, None] * self.layout.num_k + idx
        if bias is None and bool((num == idx.shape[1]).all()):
            return Chunk(rows, blocks, None)
        listed = (torch.arange(idx.shape[1], device=idx.device) < num[:, None])[..., None]
        if bias is None:
            mask = listed.expand(-1, -1, self.layout.block_k)
        elif bias.dtype == torch.bool:  # [nK, block_k]
            mask = listed & bias[idx]
        else:  # [B|1, Hq|1, nK, block_k]
            where = (batch % bias.shape[0], head % bias.shape[1])
            mask = bias[where[0][:, None], where[1][:, None], idx].masked_fill(~listed, -torch.inf)
        return Chunk(rows, blocks, mask.flatten(1)[:, None])

    def _bias(self, key_bias: Tensor | None) -> Tensor | None:
        """Which keys exist, bool [nK, block_k], or the bias [B|1, Hq|1, nK, block_k], -inf for those that do not."""
        layout = self.layout
        whole = layout.kv_len % layout.block_k == 0 and layout.kv_valid is None
        missing = layout.num_k * layout.block_k - layout.kv_len
        valid = F.pad(layout.valid_keys(), (0, missing)).view(layout.num_k, layout.block_k)
        if key_bias is None:
            return None if whole else valid
        bias = F.pad(key_bias, (0, missing)).unflatten(-1, (layout.num_k, layout.block_k))
        return bias.masked_fill(~valid, -torch.inf)


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, key_bias: Tensor | None = None
) -> Tensor:
    """Output [B, Hq, Sq, Dv] alone, by torch's fused attention over the gathered keys."""
    cut = Blocked(layout, q.shape[0], q.shape[1], k.shape[1])
    queries, keys, values = cut.queries(q), cut.keys(k), cut.keys(v)
    o = queries.new_zeros(*queries.shape[:2], v.shape[-1])
    for chunk in cut.chunks(key_bias):
        mask = chunk.mask if chunk.mask is None or chunk.mask.dtype == torch.bool else chunk.mask.to(q.dtype)
        part = F.scaled_dot_product_attention(
            queries[chunk.rows][:, None],
            _gathered(keys, chunk.blocks)[:, None],
            _gathered(values, chunk.blocks)[:, None],
            attn_mask=None if mask is None else mask[:, None],
            scale=scale,
        )[:, 0]
        if mask is not None:  # a row without a key is 0, whatever the fused kernel makes of it
            dead = (~mask if mask.dtype == torch.bool else mask == -torch.inf).all(-1, keepdim=True)
            part = part.masked_fill(dead, 0)
        o[chunk.rows] = part
    return cut.uncut_queries(o)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, Dv] in q's type and LSE [B, Hq, Sq], computed in float32 (float64 for float64)."""
    cut = Blocked(layout, q.shape[0], q.shape[1], k.shape[1])
    queries, keys, values, wide = cut.queries(q), cut.keys(k), cut.keys(v), wide_type(q)
    o = queries.new_zeros(*queries.shape[:2], v.shape[-1])
    lse = torch.full(queries.shape[:2], -torch.inf, dtype=wide, device=q.device)
    for chunk in cut.chunks(key_bias):
        scores = _scores(queries[chunk.rows].to(wide), _gathered(keys, chunk.blocks).to(wide), scale, chunk.mask)
        lse[chunk.rows] = scores.logsumexp(-1)
        p = _weights(scores, lse[chunk.rows])
        o[chunk.rows] = (p @ _gathered(values, chunk.blocks).to(wide)).to(q.dtype)
    return cut.uncut_queries(o).contiguous(), cut.uncut_queries(lse[..., None])[..., 0].contiguous()


def backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the inputs' type from the gradients of output and LSE.

    ds_ij = P_ij (do_i.v_j - do_i.o_i + dL_i).
    """
    cut = Blocked(layout, q.shape[0], q.shape[1], k.shape[1])
    wide = wide_type(q)
    delta = (d_o.to(wide) * o.to(wide)).sum(-1) - (0 if d_lse is None else d_lse.to(wide))
    queries, keys, values, d_out = cut.queries(q), cut.keys(k), cut.keys(v), cut.queries(d_o)
    deltas, sums = cut.queries(delta[..., None]), cut.queries(lse.to(wide)[..., None])[..., 0]
    dq = torch.zeros(queries.shape, dtype=wide, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (keys, values))
    for chunk in cut.chunks(key_bias):
        q_rows, k_rows = queries[chunk.rows].to(wide), _gathered(keys, chunk.blocks).to(wide)
        p = _weights(_scores(q_rows, k_rows, scale, chunk.mask), sums[chunk.rows])
        d_rows = d_out[chunk.rows].to(wide)
        d_p = d_rows @ _gathered(values, chunk.blocks).to(wide).transpose(-1, -2)
        d_s = p * (d_p - deltas[chunk.rows]) * scale
        dq[chunk.rows] = d_s @ k_rows
        dk.index_add_(0, chunk.blocks.flatten(), (d_s.transpose(-1, -2) @ q_rows).view(-1, *keys.shape[1:]))
        dv.index_add_(0, chunk.blocks.flatten(), (p.transpose(-1, -2) @ d_rows).view(-1, *values.shape[1:]))
    return (
        cut.uncut_queries(dq).to(q.dtype, memory_format=torch.contiguous_format),
        cut.uncut_keys(dk).to(k.dtype, memory_format=torch.contiguous_format),
        cut.uncut_keys(dv).to(v.dtype, memory_format=torch.contiguous_format),
    )


def tangent(
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tangents of output and LSE along those of q, k, v (None is 0).

    s'_ij = scale (q'_i.k_j + q_i.k'_j), L'_i = sum_j P_ij s'_ij, o'_i = sum_j P_ij (s'_ij v_j + v'_j) - L'_i o_i.
    """
    cut = Blocked(layout, q.shape[0], q.shape[1], k.shape[1])
    wide = wide_type(q)
    queries, keys, values = cut.queries(q), cut.keys(k), cut.keys(v)
    q_dot, k_dot, v_dot = (
        None if t is None else into(t) for t, into in zip(tangents, (cut.queries, cut.keys, cut.keys), strict=True)
    )
    outs, sums = cut.queries(o), cut.queries(lse.to(wide)[..., None])[..., 0]
    o_dot = torch.zeros(*queries.shape[:2], v.shape[-1], dtype=wide, device=q.device)
    lse_dot = torch.zeros(queries.shape[:2], dtype=wide, device=q.device)
    for chunk in cut.chunks(key_bias):
        q_rows, k_rows = queries[chunk.rows].to(wide), _gathered(keys, chunk.blocks).to(wide)
        p = _weights(_scores(q_rows, k_rows, scale, chunk.mask), sums[chunk.rows])
        s_dot = torch.zeros_like(p)
        if q_dot is not None:
            s_dot += scale * q_dot[chunk.rows].to(wide) @ k_rows.transpose(-1, -2)
        if k_dot is not None:
            s_dot += scale * q_rows @ _gathered(k_dot, chunk.blocks).to(wide).transpose(-1, -2)
        s_dot *= p
        lse_dot[chunk.rows] = s_dot.sum(-1)
        part = s_dot @ _gathered(values, chunk.blocks).to(wide)
        part -= lse_dot[chunk.rows][..., None] * outs[chunk.rows].to(wide)
        if v_dot is not None:
            part += p @ _gathered(v_dot, chunk.blocks).to(wide)
        o_dot[chunk.rows] = part
    o_dot, lse_dot = cut.uncut_queries(o_dot), cut.uncut_queries(lse_dot[..., None])[..., 0]
    return o_dot.to(o.dtype, memory_format=torch.contiguous_format), lse_dot.to(lse.dtype).contiguous()


def wide_type(x: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cut(x: Tensor, blocks: int, size: int) -> Tensor:
    missing = blocks * size - x.shape[2]
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, size, x.shape[-1])


def _gathered(x: Tensor, blocks: Tensor) -> Tensor:
    """[blocks, size, D] -> [R, n * size, D]."""
    return x.index_select(0, blocks.flatten()).view(len(blocks), -1, x.shape[-1])


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = scale * q @ k.transpose(-1, -2)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(s - L), 0 in a row without keys, whose L is -inf."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
