"""The oracle: dense attention under a token mask, slow and obvious. Gradients and JVPs are torch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.kernels.attention.layout import BlockLayout


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    key_bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, Dv] and log sum of exponentials [B, Hq, Sq], computed and returned in `dtype`.

    q: [B, Hq, Sq, D], k: [B, Hkv, Skv, D], v: [B, Hkv, Skv, Dv].  key_bias: [B|1, Hq|1, Skv], added to the logits.
    A query that reads no key gives 0 and -inf, and no gradient.
    """
    q, k, v = q.to(dtype), _per_query_head(k, q).to(dtype), _per_query_head(v, q).to(dtype)
    logits = scale * q @ k.transpose(-1, -2)
    if key_bias is not None:
        logits = logits + key_bias.to(dtype)[..., None, :]
    logits = logits.masked_fill(~layout.token_mask(), -torch.inf)
    highest = logits.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weights = torch.exp(logits - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (highest + torch.log(total)).masked_fill(empty, -torch.inf)
    return weights @ v / total, lse.squeeze(-1)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Key/value heads repeated for the query heads that share them."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)
