"""Outputs over two sets of keys brought together: one softmax over their union."""

from __future__ import annotations

import math

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.kernels.attention.merge import merge, rescale


def problem(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, n, 8, generator=draw, dtype=torch.float64) for n in (5, 7, 7, 4, 4))


def softmax(q, k, v, bias=0.0):
    logits = q @ k.mT + bias
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def union(q, k_a, v_a, k_b, v_b, weights=(1.0, 1.0)):
    bias = torch.cat(
        [torch.full((k.shape[2],), math.log(w), dtype=torch.float64) for k, w in ((k_a, weights[0]), (k_b, weights[1]))]
    )
    return softmax(q, torch.cat((k_a, k_b), 2), torch.cat((v_a, v_b), 2), bias)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 32.0)])
def test_it_is_one_softmax_over_the_union_with_its_gradient(weights):
    inputs = [x.requires_grad_() for x in problem()]
    q, k_a, v_a, k_b, v_b = inputs
    wanted, wanted_lse = union(*inputs, weights)
    found, lse = merge(*softmax(q, k_a, v_a), *softmax(q, k_b, v_b), weights)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=1e-12)
    draw = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((found * draw).sum() + lse.square().sum(), inputs),
        torch.autograd.grad((wanted * draw).sum() + wanted_lse.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_queries_without_keys_take_the_other_side_and_give_no_nan():
    draw = torch.Generator().manual_seed(0)
    o_a, o_b = (torch.randn(1, 1, 4, 3, generator=draw) for _ in range(2))
    lse_a, lse_b = (
        torch.tensor([[[0.5, -torch.inf, 2.0, -torch.inf]]]),
        torch.tensor([[[1.0, 1.0, -torch.inf, -torch.inf]]]),
    )
    o_a, o_b = o_a.masked_fill(lse_a[..., None] == -torch.inf, 0), o_b.masked_fill(lse_b[..., None] == -torch.inf, 0)
    inputs = [x.requires_grad_() for x in (o_a, lse_a, o_b, lse_b)]
    o, lse = merge(*inputs)
    assert torch.equal(o[0, 0, 1], o_b[0, 0, 1]) and torch.equal(o[0, 0, 2], o_a[0, 0, 2]) and not o[0, 0, 3].any()
    assert lse[0, 0, 1:].tolist() == [1.0, 2.0, -torch.inf]
    gradients = torch.autograd.grad(o.sum() + lse[lse > -torch.inf].sum(), inputs)
    assert all(x.isfinite().all() for x in gradients) and not gradients[1][0, 0, 3]


def test_detached_lse_hold_the_shares_constant():
    q, k_a, v_a, k_b, v_b = problem()
    v_a.requires_grad_()
    (o_a, lse_a), (o_b, lse_b) = softmax(q, k_a, v_a), softmax(q, k_b, v_b)
    lse_a.requires_grad_()
    o, _ = merge(o_a, lse_a.detach(), o_b, lse_b)
    assert torch.autograd.grad(o.sum(), (v_a, lse_a), allow_unused=True)[1] is None


def test_the_merge_keeps_its_inputs_type():
    o, lse = torch.ones(1, 1, 2, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 2)
    found, found_lse = merge(o, lse, o, lse)
    assert found.dtype == torch.bfloat16 and torch.equal(found, o) and found_lse.dtype == torch.float32
    assert rescale(o, lse, lse).dtype == torch.bfloat16


def test_rescaled_parts_of_dense_attention_add_up():
    q, k_a, v_a, k_b, v_b = problem()
    wanted, full = union(q, k_a, v_a, k_b, v_b)
    parts = [rescale(*softmax(q, k, v), full) for k, v in ((k_a, v_a), (k_b, v_b))]
    torch.testing.assert_close(parts[0] + parts[1], wanted, rtol=0, atol=1e-12)
    nothing = torch.full((1, 1, 1), -torch.inf)
    o = torch.zeros(1, 1, 1, 2, requires_grad=True)
    found = rescale(o, nothing.requires_grad_(), nothing)
    assert not found.any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), (o, nothing)))


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, -1.0), (1.0, float("inf"))])
def test_weights_are_positive(weights):
    o, lse = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2)
    with pytest.raises(UserError, match="weights must be two numbers > 0"):
        merge(o, lse, o, lse, weights)
