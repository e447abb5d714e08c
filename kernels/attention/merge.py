"""Outputs of attention over two sets of keys brought together by their LSE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffdistill.errors import UserError


def merge(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, weights: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys: o [B, H, S, D] in o_a's type, lse [B, H, S].

    o_a, o_b: [B, H, S, D], lse_a, lse_b: [B, H, S], natural, as `block_sparse_attention` returns them.  weights: each
    key of a set counts so many times. It is one softmax over all keys with log weights added to the logits; a key in
    both sets counts in both. Gradients are exact through outputs and LSE; detach the LSE to hold the shares constant.
    A query without keys on both sides gives 0 and -inf, and no gradient. Raises UserError for weights that are not > 0.
    """
    if len(weights) != 2 or not all(0 < w < math.inf for w in weights):
        raise UserError("weights", "must be two numbers > 0", weights, "1 counts every key once.")
    lse_a, lse_b = lse_a + math.log(weights[0]), lse_b + math.log(weights[1])
    nothing = torch.maximum(lse_a, lse_b) == -torch.inf
    lse_a, lse_b = (x.masked_fill(nothing, 0) for x in (lse_a, lse_b))  # -inf - -inf has no gradient
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    o = share * o_a + (1 - share) * o_b
    return o.to(o_a.dtype), torch.logaddexp(lse_a, lse_b).masked_fill(nothing, -torch.inf)


def rescale(o: Tensor, lse: Tensor, lse_full: Tensor) -> Tensor:
    """What o's keys contribute to attention over all keys: o exp(lse - lse_full), [B, H, S, D] in o's type.

    lse, lse_full: [B, H, S], of o's keys and of all. The factor is the share of attention that o's keys have. A query
    without keys gives 0.
    """
    nothing = lse == -torch.inf
    share = torch.exp(lse.masked_fill(nothing, 0) - lse_full.masked_fill(nothing, 0)).masked_fill(nothing, 0)
    return (share[..., None] * o).to(o.dtype)
