"""The cpu backend against dense attention in float64, written out here; nothing of the package's own reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.kernels.attention import build, ceiling, cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no cpu kernel: {cpu.why_not()}")
FP32, BF16 = torch.float32, torch.bfloat16
# B, Hq, Hkv, Sq, Skv, D, Dv, block_q, block_k
SHAPES = {
    "square": (1, 2, 2, 256, 256, 64, 64, 128, 128),
    "ragged_gqa": (2, 4, 2, 300, 411, 64, 64, 64, 128),
    "odd_widths": (1, 2, 1, 200, 150, 37, 51, 128, 64),
    "long_keys": (1, 2, 2, 129, 700, 128, 128, 64, 64),
    "narrow": (1, 1, 1, 70, 130, 1, 3, 64, 64),
    "widest": (1, 1, 1, 70, 130, 256, 256, 64, 128),
    "one_token": (1, 1, 1, 1, 1, 16, 40, 128, 128),
}


def lists(mask, q_len, kv_len, block_q, block_k, kv_valid=None):
    """A layout from mask [B|1, H|1, nQ, nK] bool."""
    num = mask.sum(-1)
    idx = torch.argsort((~mask).int(), dim=-1, stable=True)[..., : max(1, int(num.max()))]
    idx = torch.where(torch.arange(idx.shape[-1]) < num[..., None], idx, 0)
    return SimpleNamespace(
        block_q=block_q,
        block_k=block_k,
        q_len=q_len,
        kv_len=kv_len,
        kv_num=num.int(),
        kv_idx=idx.int(),
        kv_valid=kv_valid,
    )


def allowed(mask, layout):
    """mask by token: [B|1, H|1, Sq, Skv]."""
    by_row = mask.repeat_interleave(layout.block_q, 2)[:, :, : layout.q_len]
    dense = by_row.repeat_interleave(layout.block_k, 3)[..., : layout.kv_len]
    if layout.kv_valid is None:
        return dense
    place = torch.arange(layout.kv_len)
    return dense & (place % layout.block_k < layout.kv_valid[place // layout.block_k])


def attention(q, k, v, seen, scale, bias=None):
    """Dense attention in the inputs' precision: o, lse; a query that sees nothing has o = 0 and lse = -inf."""
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return p @ v.repeat_interleave(group, 1), lse


def case(name, dtype, seed=0):
    """Random tensors as [B, S, H, D] seen transposed, a mask with an empty and a full row, valid counts, a bias."""
    b, hq, hkv, sq, skv, d, dv, block_q, block_k = SHAPES[name]
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, s, h, w, generator=rng).to(dtype).transpose(1, 2)
        for s, h, w in ((sq, hq, d), (skv, hkv, d), (skv, hkv, dv))
    )
    num_q, num_k = -(-sq // block_q), -(-skv // block_k)
    mask = torch.rand(b, hq, num_q, num_k, generator=rng) < 0.6
    mask[:, :, -1] = True
    if num_q > 1:
        mask[:, :, 0] = False
    valid = torch.randint(0, block_k + 1, (num_k,), generator=rng, dtype=torch.int32)
    valid[0] = block_k - 3
    bias = torch.randn(1, hq, skv, generator=rng)
    bias[..., skv // 2 :: 7] = -torch.inf if skv > 1 else 0
    layout = lists(mask, sq, skv, block_q, block_k, valid)
    grads = torch.randn(b, hq, sq, dv, generator=rng).to(dtype), torch.randn(b, hq, sq, generator=rng)
    return SimpleNamespace(
        q=q, k=k, v=v, layout=layout, seen=allowed(mask, layout), bias=bias, scale=1.3 * d**-0.5, grads=grads
    )


def exact(c):
    """o, lse and gradients by autograd in float64."""
    q, k, v = (x.double().requires_grad_() for x in (c.q, c.k, c.v))
    o, lse = attention(q, k, v, c.seen, c.scale, None if c.bias is None else c.bias.double())
    d_o, d_lse = c.grads
    loss = (o * d_o).sum() + (torch.where(lse == -torch.inf, 0.0, lse) * d_lse).sum()
    return o.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))


def ours(c):
    o, lse = cpu.forward(c.q, c.k, c.v, c.layout, c.scale, c.bias)
    return o, lse, *cpu.backward(*c.grads, c.q, c.k, c.v, o, lse, c.layout, c.scale, c.bias)


def rounded(c):
    """What bf16 storage of probabilities, their gradients and results alone costs: the products stay in float64."""
    group = c.q.shape[1] // c.k.shape[1]
    q, k, v = c.q.double(), c.k.double().repeat_interleave(group, 1), c.v.double().repeat_interleave(group, 1)
    logits = (q @ k.transpose(-1, -2) * c.scale + c.bias.double()[:, :, None]).masked_fill(~c.seen, -torch.inf)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    p = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse))
    half = lambda x: x.to(BF16).double()  # noqa: E731
    o = half(half(p) @ v)
    d_o, d_lse = (x.double() for x in c.grads)
    delta = (d_o * o).sum(-1, keepdim=True) - d_lse[..., None]
    ds = half(p * (d_o @ v.transpose(-1, -2) - delta))
    share = lambda x: half(x.unflatten(1, (-1, group)).sum(2))  # noqa: E731
    return o, lse[..., 0], half(ds @ k * c.scale), share(ds.mT @ q * c.scale), share(half(p).mT @ d_o)


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.fixture(params=cpu.VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setenv(cpu.CHOICE, request.param)
    try:
        assert cpu.variant() == request.param
    except UserError:
        pytest.skip(f"this processor does not run {request.param}")
    return request.param


@pytest.mark.parametrize("name", SHAPES)
def test_float32_equals_dense_attention_and_its_gradients(variant, name):
    c = case(name, FP32)
    want, got = exact(c), ours(c)
    sees = want[1] > -torch.inf
    assert torch.equal(got[1] == -torch.inf, ~sees)
    assert (got[0][~sees] == 0).all() and (got[2][~sees] == 0).all()
    assert (got[1].double() - want[1])[sees].abs().max() < 2e-5
    assert all(error(g, w) < 1e-5 for g, w in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_is_within_three_times_the_error_of_rounding(variant, name):
    c = case(name, BF16)
    want, floor, got = exact(c), rounded(c), ours(c)
    assert all(x.dtype == BF16 for x in (got[0], *got[2:]))
    sees = want[1] > -torch.inf
    assert torch.equal(got[1] == -torch.inf, ~sees)
    assert (got[1].double() - want[1])[sees].abs().max() < 1e-3
    for i, part in ((0, "o"), (2, "dq"), (3, "dk"), (4, "dv")):
        # where the exact value is nearly zero (one key: dS = 0) both errors are rounding noise of the same terms
        noise = 1e-2 * c.grads[0].double().norm() if name == "one_token" else 0
        allowance = 3 * (floor[i] - want[i]).norm() + 1e-4 * want[i].norm() + noise
        assert (got[i].double() - want[i]).norm() <= allowance, part


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
def test_every_block_shape_and_shared_lists(dtype, block_q, block_k):
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, s, 32, generator=rng).to(dtype) for s in (333, 290, 290))
    mask = torch.rand(1, 1, -(-333 // block_q), -(-290 // block_k), generator=rng) < 0.5
    layout = lists(mask, 333, 290, block_q, block_k)
    o, lse = cpu.forward(q, k, v, layout, 0.2)
    want, want_lse = attention(q.double(), k.double(), v.double(), allowed(mask, layout), 0.2)
    assert error(o, want) < (1e-5 if dtype == FP32 else 5e-3)
    sees = want_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, sees) and (lse - want_lse)[sees].abs().max() < 1e-3


def test_no_list_entry_at_all_gives_zeros(variant):
    c = case("ragged_gqa", FP32)
    c.layout = lists(torch.zeros(2, 4, 5, 4, dtype=torch.bool), 300, 411, 64, 128)
    o, lse, *grads = ours(c)
    assert (lse == -torch.inf).all() and all((x == 0).all() for x in (o, *grads))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_logits_of_fifty_keep_probabilities_and_lse_consistent(variant, dtype):
    c = case("square", dtype)
    c.bias = torch.zeros(1, 1, 256)
    logits = c.q.double() @ c.k.double().transpose(-1, -2)
    c.scale = 50 / logits.abs().max().item()
    want, got, floor = exact(c), ours(c), rounded(c)
    for i in (0, 2, 3, 4):
        limit = 2e-5 if dtype == FP32 else 3 * error(floor[i], want[i]) + 1e-3
        assert error(got[i], want[i]) < limit, i


def test_a_late_maximum_rescales_what_was_summed(variant):
    q, v = torch.ones(1, 1, 64, 4), torch.randn(1, 1, 256, 8, generator=torch.Generator().manual_seed(2))
    k = torch.linspace(-30, 30, 256)[None, None, :, None].expand(1, 1, 256, 4).contiguous()
    layout = lists(torch.ones(1, 1, 1, 4, dtype=torch.bool), 64, 256, 64, 64)
    o, lse = cpu.forward(q, k, v, layout, 1.0)
    want, want_lse = attention(q.double(), k.double(), v.double(), torch.ones(64, 256, dtype=torch.bool), 1.0)
    assert error(o, want) < 1e-5 and (lse - want_lse).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_keys_past_the_valid_count_are_never_read(variant, dtype):
    c = case("ragged_gqa", dtype)
    before = ours(c)
    place = torch.arange(411)
    past = place % 128 >= c.layout.kv_valid[place // 128]
    for x in (c.k, c.v):
        x[:, :, past] = torch.nan
    after = ours(c)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert (after[3][:, :, past] == 0).all() and (after[4][:, :, past] == 0).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strided_views_give_the_bits_of_contiguous_copies(dtype):
    c = case("ragged_gqa", dtype)
    wide = torch.randn(2, 4, 300, 200).to(dtype)
    c.q = wide[..., 1:65]  # rows that start at odd addresses
    views = ours(c)
    c.q, c.k, c.v = (x.contiguous() for x in (c.q, c.k, c.v))
    assert all(torch.equal(x, y) for x, y in zip(views, ours(c), strict=True))
    c.q = c.q.transpose(-1, -2).contiguous().transpose(-1, -2)  # last stride not 1: copied
    assert all(torch.equal(x, y) for x, y in zip(views, ours(c), strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["ragged_gqa", "long_keys"])
def test_threads_do_not_change_a_bit(variant, dtype, name):
    c, threads = case(name, dtype), torch.get_num_threads()
    try:
        results = []
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            results.append(ours(c))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for again in results[1:] for x, y in zip(results[0], again, strict=True))


def test_one_head_is_split_between_threads_and_summed_in_one_order():
    c, threads = case("long_keys", FP32), torch.get_num_threads()
    c.q, c.k, c.v = c.q[:, :1], c.k[:, :1], c.v[:, :1]
    c.bias, c.seen, c.grads = c.bias[:, :1], c.seen[:, :1], tuple(x[:, :1] for x in c.grads)
    c.layout.kv_num, c.layout.kv_idx = c.layout.kv_num[:, :1].contiguous(), c.layout.kv_idx[:, :1].contiguous()
    want = exact(c)
    try:
        torch.set_num_threads(4)
        many = ours(c)
        torch.set_num_threads(1)
        one = ours(c)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(many, one, strict=True))
    assert all(error(one[i], want[i]) < 1e-5 for i in (0, 2, 3, 4))


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        ("kv_idx", lambda x: x.kv_idx[0, 0, 3].copy_(torch.tensor([0, 2, 1, 3]))),
        ("kv_idx", lambda x: x.kv_idx[0, 0, 3].copy_(torch.tensor([0, 1, 1, 3]))),
        ("kv_idx", lambda x: x.kv_idx[0, 0, 3].copy_(torch.tensor([0, 1, 2, 4]))),
        ("kv_idx", lambda x: x.kv_idx[0, 0, 3].copy_(torch.tensor([-1, 1, 2, 3]))),
        ("kv_num", lambda x: x.kv_num[1, 3, 4].fill_(5)),
        ("kv_num", lambda x: x.kv_num[1, 3, 4].fill_(-1)),
        ("kv_valid", lambda x: x.kv_valid[1].fill_(129)),
        ("kv_valid", lambda x: x.kv_valid[1].fill_(-1)),
        ("block", lambda x: setattr(x, "block_k", 32)),
        ("kv_num", lambda x: setattr(x, "kv_num", x.kv_num[..., :2])),
        ("kv_idx", lambda x: setattr(x, "kv_idx", x.kv_idx.long())),
        ("layout", lambda x: setattr(x, "q_len", 299)),
        ("layout", lambda x: (setattr(x, "kv_num", x.kv_num[:, :3]), setattr(x, "kv_idx", x.kv_idx[:, :3]))),
    ],
)
def test_malformed_lists_are_refused_by_name(key, spoil):
    c = case("ragged_gqa", FP32)
    c.layout = lists(torch.ones(2, 4, 5, 4, dtype=torch.bool), 300, 411, 64, 128, c.layout.kv_valid)
    o, lse = cpu.forward(c.q, c.k, c.v, c.layout, c.scale)
    spoil(c.layout)
    for refused in (
        lambda: cpu.forward(c.q, c.k, c.v, c.layout, c.scale),
        lambda: cpu.backward(o, None, c.q, c.k, c.v, o, lse, c.layout, c.scale),
    ):
        with pytest.raises(UserError, match=key):
            refused()


def test_tensors_that_do_not_fit_are_refused_by_name():
    c = case("ragged_gqa", FP32)
    go = lambda **new: cpu.forward(**{**dict(q=c.q, k=c.k, v=c.v, layout=c.layout, scale=1.0), **new})  # noqa: E731, C408
    for key, new in (
        ("float64", {"q": c.q.double()}),
        ("k, v", {"k": c.k.bfloat16()}),
        ("k must", {"k": c.k[..., :5]}),
        ("v must", {"v": c.v[:, :, :7]}),
        ("Hkv", {"q": c.q[:, :3], "layout": lists(torch.ones(1, 1, 5, 4, dtype=torch.bool), 300, 411, 64, 128)}),
        ("257", {"v": torch.zeros(2, 2, 411, 257)}),
        ("key_bias", {"key_bias": torch.zeros(2, 3, 411)}),
    ):
        with pytest.raises(UserError, match=key):
            go(**new)


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv(cpu.CHOICE, "sse2")
    with pytest.raises(UserError, match=f"{cpu.CHOICE}.*sse2"):
        cpu.variant()


def test_ceiling_is_a_rate_of_this_machine():
    rate = ceiling.register_rate("fp32", 0.02)
    assert 1e9 < rate < 1e12
    assert math.isclose(ceiling.register_rate("fp32", 0.02), rate, rel_tol=0.5)
    with pytest.raises(UserError, match="int8"):
        ceiling.register_rate("int8")


def test_without_a_compiler_the_reason_is_given(tmp_path):
    """A fresh cache and no built library: the compiler's failure is the reason, and naming the backend says it."""
    code = (
        "from pathlib import Path; from diffdistill.kernels.attention import build, cpu\n"
        "cpu.Path = lambda file: Path('/nonexistent/file')\n"
        "assert not cpu.available(); print(cpu.why_not())\n"
        "try: cpu.variant()\n"
        "except ValueError as error: print(error)"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "/bin/false"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count("/bin/false failed: exit status 1") == 2


def test_a_library_of_other_sources_is_not_used(tmp_path, monkeypatch):
    assert cpu._open(tmp_path / "absent.so") is None
    loaded = cpu._loaded()
    monkeypatch.setattr(build, "source_hash", lambda: "0" * 16)
    assert cpu._open(type(tmp_path)(loaded._name)) is None
