"""Means of blocks and scores between blocks: in torch, in C++, and by the Triton kernels under the interpreter."""

from __future__ import annotations

import pytest
import torch
from attention_cases import skip_unless
from interpreted import interpreting

from diffdistill.errors import UserError
from diffdistill.kernels.attention import cpu, cpu_scores, pooling
from diffdistill.kernels.attention.pooling import block_means, block_scores


@pytest.fixture(params=["torch", "native", "triton"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(pooling.cpu_scores, "why_not", lambda q: "torch's turn")
        yield
    elif request.param == "native":
        skip_unless("cpu")
        yield
    else:
        pytest.importorskip("triton")
        with interpreting():
            yield


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("valid", [None, [64, 50, 0]])
def test_means_are_of_the_tokens_that_exist(way, valid):
    x = random(2, 2, 150, 40).requires_grad_()
    counts = [64, 64, 22] if valid is None else valid
    given = None if valid is None else torch.tensor(valid, dtype=torch.int32)
    with torch.no_grad():
        hidden = torch.cat([torch.arange(64) >= n for n in counts])[:150]
        filled = x.masked_fill(hidden[:, None], float("nan")) if valid else x
    found = block_means(filled.detach().requires_grad_(), 64, given)
    for i, n in enumerate(counts):
        wanted = x[:, :, 64 * i : 64 * i + n].mean(2) if n else torch.zeros(2, 2, 40)
        torch.testing.assert_close(found[:, :, i], wanted, rtol=1e-5, atol=1e-6)
    weights = random(2, 2, 3, 40, seed=1)
    (gradient,) = torch.autograd.grad((block_means(x, 64, given) * weights).sum(), x)
    for i, n in enumerate(counts):
        part = gradient[:, :, 64 * i : 64 * (i + 1)]
        assert not part[:, :, n:].any()
        if n:
            torch.testing.assert_close(part[:, :, :n], (weights[:, :, i : i + 1] / n).expand(-1, -1, n, -1))


@pytest.mark.parametrize("tokens", [1, 32, (16, 8), (16, 64)])  # the last has no tile in float32
def test_probabilities_are_those_of_the_whole_matrix(way, tokens):
    of_q, of_k = (tokens, tokens) if isinstance(tokens, int) else tokens
    q, k = random(2, 4, 5 * of_q, 24), random(2, 2, 3 * of_k, 24, seed=1)
    found = block_scores(q, k, tokens)
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 24**-0.5
    wanted = logits.softmax(-1).view(2, 4, 5, of_q, 3, of_k).sum(-1).mean(3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 5))


def test_peaks_are_the_largest_weights_relative_to_each_querys_maximum(way):
    q, k = random(1, 2, 3 * 16, 32), random(1, 2, 5 * 32, 32, seed=1)
    found = block_scores(q, k, (16, 32), scale=0.7, pooling="peak")
    logits = (0.7 * q.double() @ k.double().transpose(-1, -2)).view(1, 2, 3, 16, 5, 32)
    largest = logits.amax(-1)  # of each query in each key block
    wanted = torch.exp(largest - largest.amax(-1, keepdim=True)).amax(3)
    wanted /= wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["probability", "peak"])
@pytest.mark.parametrize("blocks", [(1, 1), (9, 3), (5, 140)])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 64), (32, 2), (128, 8)])
def test_native_scores_of_any_number_of_blocks(blocks, tokens, name):
    skip_unless("cpu")
    q, k = random(2, 4, blocks[0] * tokens[0], 37), random(2, 2, blocks[1] * tokens[1], 37, seed=1)
    if blocks == (5, 140):
        q = 40 * q  # shares between 1 and less than float32 holds
    found = block_scores(q, k, tokens, pooling=name)
    wanted = pooling._torch_scores(q.double(), k.double(), *tokens, 37**-0.5, name == "peak")
    wanted /= wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=2e-4 if blocks == (5, 140) else 1e-5, atol=1e-12)


@pytest.mark.parametrize("variant", cpu.VARIANTS)
def test_every_instruction_set_scores_bfloat16_rows_where_they_lie(variant, monkeypatch):
    skip_unless("cpu")
    if variant not in cpu._runnable(cpu.library()):
        pytest.skip(f"this processor does not run {variant}")
    monkeypatch.setenv(cpu.CHOICE, variant)
    for width in (64, 45):
        x = random(2, 96, 4, width).bfloat16()  # [B, S, H, D]
        q, k = x.transpose(1, 2), x.flip(1)[:, :, :2].transpose(1, 2)
        wanted = pooling._torch_scores(q.double(), k.double(), 32, 16, width**-0.5, False)
        torch.testing.assert_close(block_scores(q, k, (32, 16)), wanted, rtol=2e-3, atol=1e-6)


def test_what_the_native_scores_do_not_take_goes_to_torch():
    assert "float64" in cpu_scores.why_not(random(1, 1, 4, 8).double())
    assert "256" in cpu_scores.why_not(random(1, 1, 4, 300))
    q = random(1, 1, 8, 300)
    torch.testing.assert_close(block_scores(q, q, 4), block_scores(q.double(), q.double(), 4), rtol=1e-5, atol=1e-7)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    skip_unless("cpu")
    q = random(1, 3, 512, 32)
    wanted = block_scores(q, q, 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(block_scores(q, q, 32), wanted)


def test_strided_and_half_precision_tokens(way):
    x = random(1, 96, 2, 64).half()
    q, k = x.transpose(1, 2), x.flip(1).transpose(1, 2)
    wanted = block_scores(q.double().contiguous(), k.double().contiguous(), 32)
    torch.testing.assert_close(block_scores(q, k, 32), wanted, rtol=5e-3, atol=1e-4)


def test_mistakes_are_named():
    x = torch.zeros(1, 2, 64, 8)
    for call, message in (
        (lambda: block_means(x[0], 64), "x must be \\[batch, heads, tokens, width\\]"),
        (lambda: block_means(x, 48), "block must be a power of two, got 48"),
        (lambda: block_means(x, 32, torch.ones(3, dtype=torch.int32)), "valid must be int32 \\[2\\]"),
        (lambda: block_scores(x, x, 3), "tokens must be powers of two up to 128, got 3"),
        (lambda: block_scores(x, x[:, :, :40], 32), "k must be \\[batch, heads, blocks \\* 32, width\\]"),
        (lambda: block_scores(x, x[..., :4], 32), "k must have q's batch, width and type"),
        (lambda: block_scores(x, x, 32, pooling="mean"), "pooling must be probability or peak, got 'mean'"),
        (lambda: block_scores(x, x, 32, scale=-1.0), "scale must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            call()
