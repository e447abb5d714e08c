"""Masks that follow the tokens: ASA, VSA, SpargeAttn."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffdistill.errors import UserError
from diffdistill.kernels.attention import reference
from diffdistill.kernels.attention.api import block_sparse_attention
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.masks import asa, selection
from diffdistill.kernels.attention.masks.asa import ASA
from diffdistill.kernels.attention.masks.base import attention
from diffdistill.kernels.attention.masks.sparge import Sparge, similarity
from diffdistill.kernels.attention.masks.vsa import VSA
from diffdistill.kernels.ordering import Grid

WHOLE, SMALL, RAGGED = Grid(4, 8, 32), Grid(4, 8, 12), Grid(3, 7, 23)  # 1024, 384 and 483 tokens
TEXT = Grid(4, 9, 12, text=70)  # 502
TILED, EDGES = Grid(8, 8, 16), Grid(5, 9, 14, text=20)  # 16 tiles of 64; ragged ones in every direction


def tensors(length, heads=2, kv_heads=2, width=16, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, length, width), (1, kv_heads, length, width), (1, kv_heads, length, width))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def kept(mask, q, k, grid, scale=0.25):
    return mask.layout(q, k, grid, scale).to_mask()


def dense(q, k, v, bias=0.0):
    group = q.shape[1] // k.shape[1]
    return (0.25 * q @ k.repeat_interleave(group, 1).mT + bias).softmax(-1) @ v.repeat_interleave(group, 1)


def pooled_map(q, k, block, scale=0.25):
    """Mean over a block's queries of the share that each block of keys gets."""
    weights = (scale * q @ k.mT).softmax(-1)
    return weights.unflatten(-1, (-1, block)).sum(-1).unflatten(2, (-1, block)).mean(3)


def blocks_of(noise, seed=0):
    """1024 tokens, in each 64 of them one vector and noise that grows from the first to the last."""
    base, _, noises = tensors(1024, seed=seed)
    return (
        base[:, :, ::64].repeat_interleave(64, 2) + torch.linspace(0, noise, 16).repeat_interleave(64)[:, None] * noises
    )


def shuffled_within(x, block, seed):
    places = torch.rand(x.shape[2] // block, block, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    places += torch.arange(len(places))[:, None] * block
    return x[:, :, places.flatten()]


# -- every mask -------------------------------------------------------------------------------------------------

EVERYTHING = [
    ASA(density=1.0),
    ASA(tau=1.0, least=1.0, most=1.0, order="raster"),
    ASA(density=1.0, block=64, sampled=8, pooling="peak"),
    VSA(density=1.0),
    VSA(density=1.0, tile=(4, 4, 8), block=128),
    Sparge(theta=-1.0, tau=1.0),
    Sparge(theta=1.0, order="gilbert"),  # no block is that similar
    Sparge(theta=-0.1, density=1.0, block_q=64, block_k=128),
]


@pytest.mark.parametrize("mask", EVERYTHING, ids=repr)
@pytest.mark.parametrize("grid", [SMALL, RAGGED, TEXT], ids=str)
def test_with_every_block_on_it_is_dense_attention_whatever_the_order(mask, grid):
    q, k, v = tensors(grid.length, heads=4)
    found = attention(q, k, v, grid, mask, scale=0.25, backend="reference")
    torch.testing.assert_close(found, dense(q, k, v), rtol=0, atol=1e-12)


ADAPTIVE = [
    ASA(density=0.3, sampled=8),
    ASA(tau=0.5, least=0.2, most=0.5, block=64, pooling="peak"),
    ASA(density=0.2, block=64, global_run=7),
    ASA(density=0.2, block=64, global_run=7, detach_merge=True),
    VSA(density=0.3),
    VSA(density=0.3, coarse=0.5),
    Sparge(theta=0.05, tau=0.7),
    Sparge(theta=-1.0, density=0.3),
]


@pytest.mark.parametrize("mask", ADAPTIVE, ids=repr)
def test_recomputation_under_checkpointing_gives_equal_gradients(mask):
    grid = Grid(4, 8, 12, text=30)
    tokens = tensors(grid.length, heads=4, dtype=torch.float32)

    def gradients(run):
        inputs = [x.clone().requires_grad_() for x in tokens]
        return torch.autograd.grad(run(*inputs).square().sum(), inputs)

    def once(*x):
        return attention(*x, grid, mask)

    torch.manual_seed(1)
    plain = gradients(once)
    torch.manual_seed(2)  # the global generator has no say
    again = gradients(lambda *x: checkpoint(once, *x, use_reentrant=False, preserve_rng_state=False))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_what_is_cached_in_inference_mode_may_be_saved_for_a_gradient():
    grid, mask = Grid(4, 5, 11, text=3), VSA(density=0.3)  # of no other test
    order = mask.ordering(grid)
    q, k, _ = (order.apply(x) for x in tensors(grid.length))
    with torch.inference_mode():
        mask.layout(q, k, grid, 0.25)
        asa._offsets(5, 2, 64, 8, q.device)
    assert not mask.layout(q, k, grid, 0.25).kv_valid.is_inference()
    assert not any(x.is_inference() for x in asa._offsets(5, 2, 64, 8, q.device))


@pytest.mark.parametrize("mask", [m for m in ADAPTIVE if not getattr(m, "detach_merge", False)], ids=repr)
def test_gradients_at_large_logits_are_those_of_float64(mask):
    grid = Grid(4, 8, 12)
    q, k, v = tensors(grid.length)
    q *= 12  # logits up to about 50
    along = tensors(grid.length, seed=1)[2]
    found = []
    for dtype, backend in ((torch.float32, None), (torch.float64, "reference")):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o = attention(*inputs, grid, mask, backend=backend)
        found.append([o, *torch.autograd.grad((o * along.to(dtype)).sum(), inputs)])
    for mine, theirs in zip(*found, strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < 1e-4


@pytest.mark.parametrize("mask", [ASA(density=0.25, block=64, sampled=8), VSA(), Sparge(-0.1, density=0.2)], ids=repr)
def test_equal_scores_keep_the_first_blocks(mask):
    grid = Grid(8, 8, 16)
    x = torch.ones(1, 1, grid.length, 16)
    found = kept(mask, x, x, grid)[0, 0]
    count = int(found[0].sum())
    assert 0 < count < found.shape[1] and found[:, :count].all() and not found[:, count:].any()


@pytest.mark.parametrize(
    "mask", [ASA(density=0.1, block=64, global_run=9), VSA(density=0.1), Sparge(0.0, 0.3)], ids=repr
)
def test_text_attends_and_is_attended_by_all(mask):
    q, k, v = tensors(TEXT.length)
    order = mask.ordering(TEXT)
    found = mask.layout(order.apply(q), order.apply(k), TEXT, 0.25)
    tokens = found.token_mask()[0, 0]
    real = torch.ones(order.slots, dtype=torch.bool) if order.real is None else order.real
    assert tokens[order.video :, real].all() and tokens[real, order.video :].all()
    assert not tokens[: order.video, : order.video].all()
    start = order.video // found.block_k
    others = found.to_mask()[0, :, : order.video // found.block_q, :start]
    assert others.any() and not others.all()


def test_a_head_of_queries_has_its_own_mask_where_keys_are_shared():
    q, k, _ = tensors(1024, heads=4, kv_heads=2, dtype=torch.float32)
    for mask in (ASA(density=0.25, sampled=128, order="raster"), VSA(density=0.25), Sparge(-1.0, 0.5)):
        each = kept(mask, q, k.repeat_interleave(2, 1), WHOLE)
        assert each.shape[1] == 4 and not torch.equal(each[:, 0], each[:, 1])
        assert torch.equal(kept(mask, q, k, WHOLE), each)


# -- selection --------------------------------------------------------------------------------------------------


def test_the_largest_of_each_row_ties_by_place():
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 5.0, -torch.inf]])
    assert selection.largest(scores, 3).tolist() == [[0, 1, 1, 1, 0], [1, 1, 0, 1, 0]]
    assert selection.largest(scores, torch.tensor([1, 5])).tolist() == [[0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert selection.largest(torch.tensor([[1.0, torch.nan, 2.0]]), 1).tolist() == [[0, 1, 0]]


# -- ASA --------------------------------------------------------------------------------------------------------


def test_scoring_every_token_ranks_by_the_exact_pooled_map():
    q, k, _ = tensors(1024)
    found = kept(ASA(density=0.5, sampled=128, order="raster"), q, k, WHOLE)
    scores = pooled_map(q, k, 128)
    assert found.sum(-1).eq(4).all()
    assert (scores.masked_fill(~found, torch.inf).amin(-1) > scores.masked_fill(found, 0).amax(-1)).all()


def test_tokens_may_move_inside_their_block_when_all_are_scored():
    q, k, _ = tensors(1024, dtype=torch.float32)
    mask = ASA(tau=0.6, least=0.1, most=0.9, sampled=64, block=64, order="raster")
    wanted = kept(mask, q, k, WHOLE)
    assert 0.1 < wanted.float().mean() < 0.9
    assert torch.equal(kept(mask, shuffled_within(q, 64, 1), shuffled_within(k, 64, 2), WHOLE), wanted)


def test_a_row_keeps_the_blocks_before_the_one_that_reaches_tau():
    q, k, _ = tensors(1024)
    q = 6 * q
    mask = ASA(tau=0.8, least=1 / 16, most=1.0, sampled=64, block=64, order="raster")
    found, scores = kept(mask, q, k, WHOLE), pooled_map(q, k, 64)
    mass = (scores * found).sum(-1)
    following = scores.masked_fill(found, 0).amax(-1)
    several = found.sum(-1) > 1  # the least
    assert several.any() and (mass[several] < 0.8).all() and (mass + following >= 0.8).all()


@pytest.mark.parametrize(("sharpness", "rows"), [(0.0, 5), (60.0, 2)])  # flat rows reach the most, sharp ones the least
def test_rows_stay_between_least_and_most(sharpness, rows):
    grid = Grid(4, 16, 32)
    x = tensors(32)[0].repeat_interleave(64, 2)  # each block is like itself alone
    found = kept(ASA(least=0.05, most=0.17, block=64, order="raster"), sharpness * x, x, grid)
    counts = found.sum(-1)
    assert counts.min() / 32 >= 0.05 and counts.max() / 32 <= 0.17
    assert (counts == rows).float().mean() > 0.5


@pytest.mark.parametrize(("grid", "run"), [(SMALL, 16), (RAGGED, 15), (TEXT, 9)], ids=str)
@pytest.mark.parametrize("detach", [False, True])
def test_the_global_branch_is_one_softmax_over_the_union(grid, run, detach):
    mask = ASA(density=0.3, block=64, global_run=run, detach_merge=detach, sampled=8)
    q, k, v = tensors(grid.length, heads=4)
    o = attention(q, k, v, grid, mask, 0.25, backend="reference")
    order = mask.ordering(grid)
    q, k, v = (order.apply(x) for x in (q, k, v))
    layout = mask.layout(q, k, grid, 0.25)
    parts = range(0, grid.length, run)
    means = [torch.stack([x[:, :, i : i + run].mean(2) for i in parts], 2) for x in (k, v)]
    counts = torch.tensor([min(run, grid.length - i) for i in parts], dtype=torch.float32)
    bias = torch.zeros(grid.length, dtype=torch.float64).masked_fill(~layout.token_mask(), -torch.inf)
    bias = torch.cat((bias, counts.log().double().expand(*bias.shape[:-1], -1)), -1)
    wanted = dense(q, torch.cat((k, means[0]), 2), torch.cat((v, means[1]), 2), bias)
    torch.testing.assert_close(o, order.undo(wanted), rtol=0, atol=1e-12)


def test_a_detached_merge_has_the_releases_gradient():
    q, k, v = tensors(WHOLE.length)
    layout = ASA(density=0.3, order="raster").layout(q, k, WHOLE, 0.25)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    gradients = []
    for detach in (True, False):
        mask = ASA(density=0.3, order="raster", global_run=8, detach_merge=detach)
        o = attention(q, k, v, WHOLE, mask, 0.25, backend="reference")
        gradients.append(torch.autograd.grad(o.square().sum(), inputs))
    o, lse = reference.attention(q, k, v, layout, 0.25)
    means = [x.unflatten(2, (-1, 8)).mean(3) for x in (k, v)]
    logits = 0.25 * q @ means[0].mT
    share = torch.sigmoid(lse - logits.logsumexp(-1) - math.log(8)).detach()[..., None]
    o = share * o + (1 - share) * logits.softmax(-1) @ means[1]
    for mine, wanted, exact in zip(
        gradients[0], torch.autograd.grad(o.square().sum(), inputs), gradients[1], strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)
        if exact is not gradients[1][2]:  # v's is the same
            assert not torch.allclose(mine, exact, rtol=1e-3, atol=1e-3)


def test_samples_are_drawn_from_the_seed_alone_for_each_head_and_side():
    q, k, _ = tensors(1024, heads=8, kv_heads=8)
    same = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    mask = ASA(density=0.5, sampled=4, order="raster")
    found = kept(mask, *same, WHOLE)
    torch.rand(3)
    assert torch.equal(kept(ASA(density=0.5, sampled=4, order="raster"), *same, WHOLE), found)
    of_q, of_k = asa._offsets(0, 8, 128, 4, q.device)
    another_process = inspect.unwrap(asa._offsets)(0, 8, 128, 4, q.device)
    assert torch.equal(of_q, another_process[0]) and torch.equal(of_k, another_process[1])
    assert not (of_q == of_k).all(-1).any()
    assert not (found == found[:, :1]).all()
    assert not torch.equal(kept(ASA(density=0.5, sampled=4, order="raster", seed=1), *same, WHOLE), found)
    two = torch.cat((same[0], 2 * same[0])), torch.cat((same[1], same[1]))
    assert torch.equal(kept(mask, *two, WHOLE)[:1], found)  # whatever else is in the batch


# -- VSA --------------------------------------------------------------------------------------------------------


def test_a_row_keeps_the_tiles_whose_means_score_highest():
    q, k, _ = tensors(EDGES.length)
    mask = VSA(density=0.2)
    order = mask.ordering(EDGES)
    found = kept(mask, order.apply(q), order.apply(k), EDGES)[0, :, :-1, :-1]  # the last is text
    tiles = [order.index[i : i + 64][order.real[i : i + 64]] for i in range(0, order.video, 64)]
    means = [torch.stack([x[0][:, tile].mean(1) for tile in tiles], 1) for x in (q, k)]
    text = k[0, :, :20].mean(1, keepdim=True)
    scores = means[0] @ torch.cat((means[1], text), 1).mT
    best = scores.argsort(-1, descending=True)[..., : math.ceil(0.2 * (len(tiles) + 1))]
    wanted = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)[..., :-1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("coarse", [0.0, 0.7])
@pytest.mark.parametrize("mask", [VSA(density=0.3), VSA(density=0.3, tile=(4, 8, 8)), VSA(tile=(4, 8, 8), block=128)])
def test_padding_slots_never_matter(mask, coarse):
    mask = VSA(mask.density, mask.tile, mask.block, coarse)
    order = mask.ordering(EDGES)
    q, k, v = (order.apply(x) for x in tensors(EDGES.length, dtype=torch.float32))
    wanted = order.undo(mask.attend(q, k, v, EDGES))
    q, k, v = (x.masked_fill(~order.real[:, None], torch.nan) for x in (q, k, v))
    assert torch.equal(order.undo(mask.attend(q, k, v, EDGES)), wanted) and wanted.isfinite().all()


def test_blocks_of_padding_alone_cost_nothing():
    mask = VSA(density=0.3, tile=(4, 8, 8))
    order = mask.ordering(EDGES)
    q, k, _ = (order.apply(x) for x in tensors(EDGES.length))
    q[..., 0], k[..., 0] = 9, torch.where(order.real, -9, 0)  # zeros would score highest
    found, real = kept(mask, q, k, EDGES)[0], order.valid(64) > 0
    assert not real.all() and not found[:, ~real].any() and not found[:, :, ~real].any()
    video = found[:, real][:, :-1, :-1]
    assert (video.sum(-1) >= math.ceil(0.3 * int(real.sum())) - 1).all()


def test_whole_tiles_are_the_kernel_without_counts():
    q, k, v = tensors(TILED.length, dtype=torch.float32)
    mask = VSA(density=0.25)
    order = mask.ordering(TILED)
    layout = mask.layout(order.apply(q), order.apply(k), TILED, 0.25)
    assert layout.kv_num.unique().tolist() == [4]
    plain = BlockLayout.from_mask(layout.to_mask(), TILED.length, TILED.length, 64, 64)
    wanted = order.undo(block_sparse_attention(*(order.apply(x) for x in (q, k, v)), plain, 0.25))
    assert torch.equal(attention(q, k, v, TILED, mask, 0.25), wanted)


def test_of_constant_tiles_the_coarse_branch_is_dense_attention():
    mask = VSA(density=0.25, coarse=1.0)
    order = mask.ordering(TILED)
    q, k, v = (order.undo(x.repeat_interleave(64, 2)) for x in tensors(16))
    fine = attention(q, k, v, TILED, VSA(density=0.25), 0.25, backend="reference")
    both = attention(q, k, v, TILED, mask, 0.25, backend="reference")
    torch.testing.assert_close(both - fine, dense(q, k, v), rtol=0, atol=1e-12)


def test_the_coarse_branch_has_its_gradient():
    q, k, v = (x.requires_grad_() for x in tensors(TILED.length))
    mask = VSA(density=1.0, coarse=0.5)
    o = attention(q, k, v, TILED, mask, 0.25, backend="reference")
    order = mask.ordering(TILED)
    means = [order.apply(x).unflatten(2, (-1, 64)).mean(3) for x in (q, k, v)]
    wanted = dense(q, k, v) + 0.5 * order.undo(dense(*means).repeat_interleave(64, 2))
    torch.testing.assert_close(o, wanted, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(o.square().sum(), (q, k, v)),
        torch.autograd.grad(wanted.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_a_density_rounds_up_but_not_by_a_rounding():
    q, k, _ = tensors(40 * 64, width=4, heads=1, kv_heads=1)
    for density, count in ((0.075, 3), (0.1 + 0.2, 12), (0.01, 1), (0.076, 4), (0.55, 22)):
        assert kept(VSA(density=density), q, k, Grid(40, 8, 8)).sum(-1).unique().tolist() == [count]


# -- SpargeAttn -------------------------------------------------------------------------------------------------


def test_similarity_is_the_mean_of_all_cosines():
    x = tensors(150)[0]
    found = similarity(x, 64)
    for i, (start, stop) in enumerate(((0, 64), (64, 128), (128, 150))):
        unit = x[:, :, start:stop] / x[:, :, start:stop].norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found[:, :, i], (unit @ unit.mT).mean((-1, -2)))
    aligned = x[:, :, :1] * torch.linspace(0.1, 3, 128)[:, None]
    torch.testing.assert_close(similarity(aligned, 64), torch.ones(1, 2, 2).double())
    assert (found >= 0).all()


def test_keys_share_any_offset_without_effect():
    q, k = blocks_of(2.0), blocks_of(2.0, seed=1)
    offset = 3 * torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = Sparge(theta=0.4, tau=0.6, block_q=64)
    wanted = kept(mask, q, k, WHOLE)
    columns = wanted.all(2)
    assert columns.any() and not columns.all() and not wanted.all(3).all()
    assert torch.equal(kept(mask, q, k + offset, WHOLE), wanted)


def test_a_row_keeps_the_largest_blocks_within_tau_at_least_one():
    q, k, _ = tensors(1024)
    means = [x.unflatten(2, (-1, n)).mean(3) for x, n in ((q, 128), (k - k.mean(2, keepdim=True), 64))]
    scores = (4 * means[0] @ means[1].mT).softmax(-1)
    found = kept(Sparge(theta=-1.0, tau=0.5), q, k, WHOLE, scale=4.0)
    mass, following = (scores * found).sum(-1), scores.masked_fill(found, 0).amax(-1)
    assert (mass <= 0.5).all() and (mass + following > 0.5).all()
    assert (scores.masked_fill(~found, 1).amin(-1) > following).all()
    assert kept(Sparge(theta=-1.0, tau=1e-6), q, k, WHOLE).sum(-1).eq(1).all()


def test_blocks_of_unlike_tokens_are_on_and_do_not_weigh():
    draw = torch.Generator().manual_seed(0)
    q, k = (10 * torch.randn(1, 1, 1024, 32, generator=draw) for _ in range(2))
    like_q, like_k = torch.ones(1024, dtype=torch.bool), torch.ones(1024, dtype=torch.bool)
    like_q[256:384], like_k[320:384] = False, False
    q[:, :, like_q], k[:, :, like_k] = 0, 0
    q[..., 0], k[..., 0] = 10, torch.arange(16).repeat_interleave(64) / 16.0
    k[:, :, ~like_k, 0] = 5  # its mean scores highest
    found = kept(Sparge(theta=0.6, density=1 / 16), q, k, WHOLE)[0, 0]
    wanted = torch.zeros_like(found)
    wanted[2], wanted[:, 5], wanted[:, 15] = True, True, True
    assert torch.equal(found, wanted)


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ASA(density=0.0), "density must lie in \\(0, 1\\], got 0.0"),
        (lambda: ASA(density=1.5), "density must lie in"),
        (lambda: ASA(tau=0.0), "tau must lie in"),
        (lambda: ASA(least=0.2, most=0.1), "least must be at most `most`, 0.1, got 0.2"),
        (lambda: ASA(sampled=48), "sampled must be a power of two up to 128, got 48"),
        (lambda: ASA(sampled=128, block=64), "sampled must be a power of two up to 64, got 128"),
        (lambda: ASA(block=32, sampled=8), "block must be one of 64, 128"),
        (lambda: ASA(pooling="mean"), "pooling must be probability or peak"),
        (lambda: ASA(global_run=0), "global_run must be >= 1, or None"),
        (lambda: ASA(order="hilbert"), "order must be gilbert or raster"),
        (lambda: VSA(density=float("nan")), "density must lie in"),
        (lambda: VSA(block=96), "block must be one of 64, 128"),
        (lambda: VSA(tile=(4, 4, 3)), "tile must be three sizes >= 1 of a multiple of 64 tokens, got \\(4, 4, 3\\)"),
        (lambda: VSA(block=128), "tile must be three sizes >= 1 of a multiple of 128 tokens"),
        (lambda: VSA(tile=(8, 8)), "tile must be three sizes"),
        (lambda: VSA(coarse=float("inf")), "coarse must be finite"),
        (lambda: Sparge(tau=2.0), "tau must lie in"),
        (lambda: Sparge(density=-0.1), "density must lie in"),
        (lambda: Sparge(theta=-2.0), "theta must lie in \\[-1, 1\\]"),
        (lambda: Sparge(block_q=256), "block_q must be one of 64, 128"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("mask", [ASA(density=0.5, global_run=4), VSA(coarse=1.0)], ids=repr)
def test_branches_of_means_take_no_bias(mask):
    q, k, v = tensors(TILED.length, dtype=torch.float32)
    with pytest.raises(UserError, match="key_bias must be None with"):
        attention(q, k, v, TILED, mask, key_bias=torch.zeros(1, 1, TILED.length))


def test_a_configuration_may_give_the_tile_as_a_list():
    assert VSA(tile=[4, 4, 4]) == VSA()
    assert hash(VSA(tile=[4, 4, 4])) == hash(VSA())
