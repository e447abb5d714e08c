"""What masks that follow the tokens are made from: means of blocks, and scores between blocks.

On a GPU by Triton kernels, and scores on a CPU by the native library: none ever holds the matrix between tokens.
Elsewhere, and for what these do not take (on a GPU scores of float32 wider than 64 or of more than 32 tokens, and
means of more than 128; on a CPU other types than float32 and bfloat16, and widths above 256), in torch by chunks of it.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention import cpu_scores
from diffdistill.kernels.attention.layout import count, described
from diffdistill.kernels.attention.triton_kernels import configs, support

Pooling = Literal["probability", "peak"]
SCORES = 2**24  # of one chunk
LARGEST = 128  # block that a kernel holds at once


def block_means(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """The mean token of each block, float32 [B, H, n, D], with its gradient; 0 for a block without tokens.

    x: [B, H, S, D], its last block may be ragged.  valid: int32 [n], of each block only its first tokens exist.
    VSA's coarse queries, keys and values (2505.13389).
    """
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise UserError("x", "must be [batch, heads, tokens, width]", described(x), "Reshape it.")
    if block < 1 or block & (block - 1):
        raise UserError("block", "must be a power of two", block, "64 and 128 are what kernels take.")
    blocks = count(x.shape[2], block)
    if valid is not None and (valid.dtype != torch.int32 or valid.shape != (blocks,)):
        raise UserError("valid", f"must be int32 [{blocks}]", described(valid), "Give one count per block.")
    return _Means.apply(x, block, valid)


def block_scores(
    q: Tensor, k: Tensor, tokens: int | tuple[int, int], scale: float | None = None, pooling: Pooling = "probability"
) -> Tensor:
    """How much each block of queries attends each block of keys, float32 [B, Hq, nQ, nK], rows sum to 1. No gradient.

    q: [B, Hq, nQ * tokens, D], k: [B, Hkv, nK * tokens, D], the same number of tokens of every block, in the blocks'
    order: all of them, a sample (ASA takes 32 of 128), or their mean (tokens=1: VSA, SpargeAttn).  tokens: a power of
    two up to 128, one for both or (of q, of k).  scale: of the logits, positive; None is D^-1/2.
    pooling: probability, the mean over a block's queries of the attention that a block's keys get; peak, the largest
    exp(s_ij - max_j s_ij) of a pair of blocks, normalised over key blocks, as BLADE's release ranks them (2508.10774).
    """
    of_q, of_k = (tokens, tokens) if isinstance(tokens, int) else tokens
    _check(q, k, of_q, of_k, pooling)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise UserError("scale", "must be positive", scale, "None is D^-1/2.")
    q, k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k))
    tile = configs.scores_tile(q.element_size(), q.shape[-1], of_q, of_k)
    if tile is not None and support.why_not(q, k, scale) is None:
        found = _launch().block_scores(q, k, of_q, of_k, scale, pooling == "peak", tile)
    elif cpu_scores.why_not(q) is None:
        found = cpu_scores.block_scores(q, k, of_q, of_k, scale, pooling == "peak")
    else:
        found = _torch_scores(q, k, of_q, of_k, scale, pooling == "peak")
    return found / found.sum(-1, keepdim=True) if pooling == "peak" else found


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, valid: Tensor | None) -> Tensor:
        ctx.shape, ctx.block, ctx.dtype = x.shape, block, x.dtype
        counts = block_counts(x.shape[2], block, x.device) if valid is None else valid.long()
        ctx.save_for_backward(counts)
        x = x if x.stride(-1) == 1 else x.contiguous()
        if block <= LARGEST and support.why_not(x, x, 1.0) is None:
            return _launch().block_means(x, block, valid)
        return _sums(x, block, None if valid is None else counts) / counts.clamp(min=1)[:, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (counts,) = ctx.saved_tensors
        share = gradient / counts.clamp(min=1)[:, None]
        exists = torch.arange(ctx.block, device=gradient.device) < counts[:, None]
        spread = share[..., None, :] * exists[..., None]
        return spread.flatten(2, 3)[:, :, : ctx.shape[2]].to(ctx.dtype), None, None


def _sums(x: Tensor, block: int, counts: Tensor | None) -> Tensor:
    """Of the tokens of each block, or of its first ones, in float32 or better: [B, H, n, D]."""
    wide, whole = torch.promote_types(x.dtype, torch.float32), x.shape[2] // block * block
    if counts is None:  # nothing to hide, nothing to copy
        parts = [x[:, :, :whole].unflatten(2, (whole // block, block)).sum(3, dtype=wide)]
        if whole < x.shape[2]:
            parts.append(x[:, :, whole:].sum(2, keepdim=True, dtype=wide))
        return torch.cat(parts, 2)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block)) if x.shape[2] > whole else x
    x = x.unflatten(2, (-1, block))
    exists = torch.arange(block, device=x.device) < counts[:, None]
    return x.masked_fill(~exists[..., None], 0).sum(3, dtype=wide)


def block_counts(length: int, block: int, device: torch.device) -> Tensor:
    """Tokens of each block, int64 [n]: the last may have fewer."""
    starts = torch.arange(count(length, block), device=device) * block
    return (length - starts).clamp(max=block)


def _torch_scores(q: Tensor, k: Tensor, of_q: int, of_k: int, scale: float, peak: bool) -> Tensor:
    """By chunks of query blocks."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).to(wide).transpose(-1, -2)
    rows = max(1, SCORES // (q.shape[0] * q.shape[1] * of_q * k.shape[-1])) * of_q
    parts = []
    for part in q.split(rows, 2):
        scores = scale * part.to(wide) @ k
        if peak:
            weights = torch.exp(scores - scores.amax(-1, keepdim=True)).unflatten(-1, (-1, of_k)).amax(-1)
            parts.append(weights.unflatten(2, (-1, of_q)).amax(3))
        else:
            weights = scores.softmax(-1).unflatten(-1, (-1, of_k)).sum(-1)
            parts.append(weights.unflatten(2, (-1, of_q)).mean(3))
    return torch.cat(parts, 2).float()


def _launch() -> Any:
    return importlib.import_module("diffdistill.kernels.attention.triton_kernels.launch")


def _check(q: Tensor, k: Tensor, of_q: int, of_k: int, pooling: str) -> None:
    if pooling not in ("probability", "peak"):
        raise UserError("pooling", "must be probability or peak", repr(pooling), "Mend the name.")
    for name, x, tokens in (("q", q, of_q), ("k", k, of_k)):
        if not 1 <= tokens <= 128 or tokens & (tokens - 1):
            raise UserError("tokens", "must be powers of two up to 128", tokens, "32 is ASA's sample.")
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2] % tokens or 0 in x.shape:
            constraint = f"must be [batch, heads, blocks * {tokens}, width]"
            raise UserError(name, constraint, described(x), "Take the same number of tokens of every block.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.dtype != k.dtype or q.shape[1] % k.shape[1]:
        constraint = "must have q's batch, width and type, and heads that divide q's"
        raise UserError("k", constraint, f"{described(k)} for {described(q)}", "Mend the projection.")
