"""Every backend against the dense reference in float64: outputs, gradients, tangents, compilation, bad input."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, bias_of, finite, layout_of, oracle, skip_unless, tensors_of
from torch.utils.checkpoint import checkpoint

from diffdistill.autodiff import jvp
from diffdistill.errors import UserError
from diffdistill.kernels.attention import api, flex, gather
from diffdistill.kernels.attention.api import block_sparse_attention, explain
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.operators import recorded_backends

KERNELS = ("cpu", "gather")
TIGHT = {torch.float32: 3e-6, torch.float64: 1e-13}


def off(found, wanted):
    """Relative error, in the norm of all entries; 0 where both are 0."""
    found, wanted = found.detach().double(), wanted.detach().double()
    error = (found - wanted).norm()
    return float(error / wanted.norm()) if wanted.norm() > 0 else float(error)


class Rounded(torch.autograd.Function):
    """To bfloat16 and back, its gradient too."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().double()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().double()


def rounded(case, layout, tensors, bias):
    """The reference with its weights, their gradients and the output rounded to bfloat16, sums in float64."""
    q, k, v = (x.double() for x in tensors)
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    logits = case.scale * q @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias.double()[..., None, :]
    logits = logits.masked_fill(~layout.token_mask(), -torch.inf)
    highest = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - highest.masked_fill(highest == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return Rounded.apply(Rounded.apply(weights) @ v / total.masked_fill(total == 0, 1))


def test_the_reference_is_torchs_own_attention_under_the_token_mask():
    case = CASES["ragged"]
    layout, tensors = layout_of(case), tensors_of(case, torch.float64)
    o, lse = oracle(case, layout, tensors, None)
    mask = layout.token_mask()
    own = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=case.scale)
    alive = mask.any(-1).expand_as(lse)
    torch.testing.assert_close(o[alive], own[alive])
    logits = case.scale * tensors[0] @ tensors[1].transpose(-1, -2)
    torch.testing.assert_close(lse, logits.masked_fill(~mask, -torch.inf).logsumexp(-1))
    assert not o[~alive].any() and (lse[~alive] == -torch.inf).all() and bool((~alive).any())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_outputs_and_lse_are_the_references(backend, name):
    skip_unless(backend)
    case = CASES[name]
    layout, tensors, bias = layout_of(case), tensors_of(case), bias_of(case)
    with recorded_backends() as ran:
        o, lse = block_sparse_attention(*tensors, layout, case.scale, bias, True, backend)
    assert ran == [backend]
    wanted, wanted_lse = oracle(case, layout, tensors, bias)
    assert o.dtype == torch.float32 and lse.dtype == torch.float32 and o.shape == wanted.shape
    assert off(o, wanted) < TIGHT[torch.float32]
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    assert (finite(lse) - finite(wanted_lse)).abs().max() < 1e-5
    assert not o[lse == -torch.inf].any()
    assert torch.equal(block_sparse_attention(*tensors, layout, case.scale, bias, backend=backend), o)
    assert off(gather.attention(*tensors, layout, case.scale, bias), wanted) < TIGHT[torch.float32]


def gradients(o, lse, tensors, seed=0):
    """Of a loss that reads output and LSE."""
    draw = torch.Generator().manual_seed(seed)
    weights, lse_weights = torch.randn(o.shape, generator=draw), torch.randn(lse.shape, generator=draw)
    loss = (o.double() * weights).sum() + (finite(lse).double() * lse_weights).sum()
    return torch.autograd.grad(loss, tensors, retain_graph=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_gradients_through_output_and_lse_are_the_references(backend, name):
    skip_unless(backend)
    case = CASES[name]
    layout, bias = layout_of(case), bias_of(case)
    tensors = tuple(x.requires_grad_() for x in tensors_of(case))
    o, lse = block_sparse_attention(*tensors, layout, case.scale, bias, True, backend)
    wanted = gradients(*oracle(case, layout, tensors, bias), tensors)
    for found, right in zip(gradients(o, lse, tensors), wanted, strict=True):
        assert found.dtype == torch.float32 and off(found, right) < 5e-6
    (alone,) = torch.autograd.grad(finite(lse).sum(), tensors[0])  # the output is not in this loss
    (right,) = torch.autograd.grad(finite(oracle(case, layout, tensors, bias)[1]).sum(), tensors[0])
    assert off(alone, right) < 5e-6


@pytest.mark.parametrize("name", ["plain", "ragged", "grouped heads", "bias", "odd widths", "interleaved"])
@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_is_within_three_times_a_rounded_references_error(backend, name):
    skip_unless(backend, torch.bfloat16)
    case = CASES[name]
    layout, bias = layout_of(case), bias_of(case)
    tensors = tuple(x.requires_grad_() for x in tensors_of(case, torch.bfloat16))
    o, lse = block_sparse_attention(*tensors, layout, case.scale, bias, True, backend)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wide = tuple(x.detach().double().requires_grad_() for x in tensors)
    wanted, wanted_lse = oracle(case, layout, wide, bias)
    coarse = rounded(case, layout, wide, bias)
    assert off(o, wanted) < 3 * off(coarse, wanted)
    assert (finite(lse) - finite(wanted_lse)).abs().max() < 2e-3
    d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(o, tensors, d_o)
    right = torch.autograd.grad(wanted, wide, d_o.double())
    loose = torch.autograd.grad(coarse, wide, d_o.double())
    for ours, exact, crude in zip(found, right, loose, strict=True):
        assert off(ours, exact) < 3 * off(crude.bfloat16(), exact)


def test_large_logits_neither_overflow_nor_vanish():
    case = CASES["plain"]
    layout, (q, k, v) = layout_of(case), tensors_of(case)
    o, lse = gather.forward(40 * q, 40 * k, v, layout, case.scale, None)
    wanted, wanted_lse = oracle(case, layout, (40 * q, 40 * k, v), None)
    assert lse[lse > -torch.inf].max() > 1000
    assert off(o, wanted) < 1e-3 and off(finite(lse), finite(wanted_lse)) < 1e-6


@pytest.mark.parametrize("backend", KERNELS)
def test_tensors_of_any_strides_give_the_same(backend):
    skip_unless(backend)
    case = CASES["plain"]
    layout, tensors = layout_of(case), tensors_of(case)
    wanted = block_sparse_attention(*tensors, layout, backend=backend)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors]  # last stride is not 1
    spaced = [torch.zeros(*x.shape[:3], 100)[..., 3:67].copy_(x) for x in tensors]
    for given in (odd, spaced, [x.expand(2, -1, -1, -1) for x in tensors]):
        found = block_sparse_attention(*given, layout, backend=backend)
        assert off(found[:1], wanted) < 1e-6 and torch.equal(found[-1], found[0])
    leaves = [x.requires_grad_() for x in odd]
    o = block_sparse_attention(*leaves, layout, backend=backend)
    right = torch.autograd.grad(block_sparse_attention(*leaves, layout, backend="reference").sum(), leaves)
    for found, exact in zip(torch.autograd.grad(o.sum(), leaves), right, strict=True):  # d_o has no strides at all
        assert off(found, exact) < 1e-5


def test_reference_and_gather_pass_gradcheck_in_float64():
    case = Case(heads=2, kv_heads=1, q_len=5, kv_len=70, width=3, v_width=2, valid=True)
    layout = layout_of(case)
    tensors = tuple(x.requires_grad_() for x in tensors_of(case, torch.float64))
    bias = torch.randn(1, 1, 70, generator=torch.Generator().manual_seed(0))
    for backend in ("reference", "gather"):

        def attend(q, k, v, backend=backend):
            return block_sparse_attention(q, k, v, layout, None, bias, True, backend)

        assert torch.autograd.gradcheck(attend, tensors, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("name", ["ragged", "grouped heads", "bias", "valid counts", "dense", "nothing on"])
@pytest.mark.parametrize("backend", KERNELS)
def test_tangents_are_those_of_the_reference(backend, name):
    skip_unless(backend)
    case = CASES[name]
    layout, tensors, bias = layout_of(case), tensors_of(case), bias_of(case)
    directions = tensors_of(case, seed=1)

    def attend(*tensors, backend=backend):
        return block_sparse_attention(*tensors, layout, case.scale, bias, True, backend)

    with recorded_backends() as ran:
        (o, lse), (o_dot, lse_dot) = jvp(attend, tensors, directions)
    assert ran == [backend]
    assert torch.equal(o, attend(*tensors)[0])
    wide = (tuple(x.double() for x in tensors), tuple(x.double() for x in directions))
    wanted, wanted_lse = torch.func.jvp(lambda *x: attend(*x, backend="reference"), *wide)[1]
    assert off(o_dot, wanted) < 5e-6 and off(lse_dot, wanted_lse) < 5e-6
    assert not wanted.isnan().any() and not o_dot[lse == -torch.inf].any() and not lse_dot[lse == -torch.inf].any()


def test_what_lies_in_slots_without_a_key_never_matters():
    """For the backend that every device has; those of the kernels are in their own tests."""
    case = CASES["valid counts"]
    layout, (q, k, v) = layout_of(case), tensors_of(case)
    absent = ~layout.valid_keys()[:, None]
    assert absent.any()

    def all_of(k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o, lse = block_sparse_attention(*leaves, layout, backend="gather", return_lse=True)
        tangents = jvp(lambda *x: block_sparse_attention(*x, layout, backend="gather"), (q, k, v), (q, k, v))[1]
        plain = gather.attention(q, k, v, layout, case.scale)
        return o, lse, plain, tangents, *torch.autograd.grad(o.sum() + finite(lse).sum(), leaves)

    filled = all_of(k.masked_fill(absent, torch.nan), v.masked_fill(absent, torch.nan))
    for found, wanted in zip(filled, all_of(k.masked_fill(absent, 0), v.masked_fill(absent, 0)), strict=True):
        assert torch.equal(found, wanted) and not wanted.isnan().any()


@pytest.mark.parametrize("name", ["ragged", "bias", "nothing on"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_pass_with_tangents_keeps_the_gradient(backend, name):
    skip_unless(backend)
    case = CASES[name]
    layout, tensors, bias = layout_of(case), tensors_of(case), bias_of(case)
    directions = tensors_of(case, seed=1)
    weight = torch.ones(1, requires_grad=True)

    def attend(q, k, v):
        return block_sparse_attention(q * weight, k * weight, v * weight, layout, case.scale, bias, True, backend)[0]

    with recorded_backends() as ran:
        value, tangent = jvp(attend, tensors, directions, graph=True)
    assert ran == [backend] and not tangent.requires_grad
    assert off(tangent, jvp(attend, tensors, directions)[1]) < 5e-6
    (found,) = torch.autograd.grad(value.square().mean(), weight)
    (wanted,) = torch.autograd.grad(attend(*tensors).square().mean(), weight)
    assert off(found, wanted) < 5e-6


def test_a_tangent_of_one_argument_leaves_the_others_still():
    case = CASES["plain"]
    layout, (q, k, v) = layout_of(case), tensors_of(case, torch.float64)
    for index, direction in enumerate(tensors_of(case, torch.float64, seed=1)):

        def attend(x, backend, index=index):
            given = [q, k, v]
            given[index] = x
            return block_sparse_attention(*given, layout, backend=backend)

        at = (q, k, v)[index]
        found = jvp(lambda x: attend(x, "gather"), (at,), (direction,))[1]
        assert off(found, jvp(lambda x: attend(x, "reference"), (at,), (direction,))[1]) < 1e-13


def test_torch_func_differentiates_the_kernels_and_their_tangents():
    case = Case(q_len=100, kv_len=90, width=16, v_width=16)
    layout, (q, k, v) = layout_of(case), tensors_of(case, torch.float64)

    def loss(q, backend):
        return block_sparse_attention(q, k, v, layout, backend=backend).square().sum()

    def slope(q, backend):
        return torch.func.jvp(lambda x: loss(x, backend), (q,), (torch.ones_like(q),))[1]

    for function in (loss, slope):
        wanted = torch.func.grad(lambda q, f=function: f(q, "reference"))(q)
        assert off(torch.func.grad(lambda q, f=function: f(q, "gather"))(q), wanted) < 1e-12
    with pytest.raises(UserError, match="backend must be reference under two derivatives in forward mode"):
        torch.func.jvp(lambda x: slope(x, "gather"), (q,), (torch.ones_like(q),))


def to_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def test_operators_have_shapes_for_fake_tensors_and_pass_torchs_checks():
    case = Case(q_len=70, kv_len=80, width=8, v_width=24)
    layout, tensors = layout_of(case), tuple(x.requires_grad_() for x in tensors_of(case))
    lists = (layout.kv_num, layout.kv_idx, None, None, 64, 64, 0.3, "gather")
    torch.library.opcheck(torch.ops.diffdistill.block_sparse_attention.default, (*tensors, *lists))
    on_meta = [torch.empty(x.shape, dtype=torch.bfloat16, device="meta") for x in tensors]
    o, lse = torch.ops.diffdistill.block_sparse_attention(*on_meta, *(to_meta(x) for x in lists))
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == ((1, 2, 70, 24), torch.bfloat16, (1, 2, 70), torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
def test_compiled_without_a_graph_break_it_gives_the_same_gradients(backend):
    skip_unless(backend)
    case = CASES["grouped heads"]
    layout, tensors = layout_of(case), tuple(x.requires_grad_() for x in tensors_of(case))

    def loss(q, k, v):
        o, lse = block_sparse_attention(q * 2, k, v, layout, return_lse=True, backend=backend)
        return o.square().sum() + finite(lse).sum()

    wanted = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, right in zip(torch.autograd.grad(compiled(*tensors), tensors), wanted, strict=True):
        assert off(found, right) < 1e-6


@pytest.mark.slow
def test_inductor_compiles_it():
    case = CASES["plain"]
    layout, tensors = layout_of(case), tuple(x.requires_grad_() for x in tensors_of(case))

    def loss(q, k, v):
        return block_sparse_attention(q.sin(), k, v, layout).square().sum()

    wanted = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True)
    for found, right in zip(torch.autograd.grad(compiled(*tensors), tensors), wanted, strict=True):
        assert off(found, right) < 1e-5


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_gives_equal_gradients(backend, reentrant):
    skip_unless(backend)
    case = CASES["interleaved"]
    layout, tensors = layout_of(case), tuple(x.requires_grad_() for x in tensors_of(case))

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, layout, backend=backend)

    plain = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    if reentrant:
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        checkpoint(attend, *leaves, use_reentrant=True).square().sum().backward()
        again = tuple(x.grad for x in leaves)
    else:
        again = torch.autograd.grad(checkpoint(attend, *tensors, use_reentrant=False).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    case = CASES["bias per head"]
    layout, tensors, bias = layout_of(case), tensors_of(case, torch.float64), bias_of(case)
    whole = gather.forward(*tensors, layout, case.scale, bias)
    monkeypatch.setattr(gather, "SCORES", 1)  # row by row
    single = gather.forward(*tensors, layout, case.scale, bias)
    assert off(single[0], whole[0]) < 1e-14 and off(finite(single[1]), finite(whole[1])) < 1e-14


# -- the rule and the named backends


def test_the_rule_is_explained_and_followed(monkeypatch):
    case = CASES["plain"]
    layout, (q, k, v) = layout_of(case), tensors_of(case)
    monkeypatch.setattr(api.cpu, "supports", lambda q, v: "no compiler")
    told = explain(q, k, v, layout)
    assert told.backend == "gather" and "no compiler" in told.why and told.refused["cpu"] == "no compiler"
    with recorded_backends() as ran:
        block_sparse_attention(q, k, v, layout)
    assert ran == ["gather"]
    with pytest.raises(UserError, match="backend must be able to answer this call: no compiler, got 'cpu'"):
        block_sparse_attention(q, k, v, layout, backend="cpu")


def test_the_native_kernel_is_taken_where_it_runs():
    skip_unless("cpu")
    case = CASES["plain"]
    layout, tensors = layout_of(case), tensors_of(case)
    assert explain(*tensors, layout).backend == "cpu"
    with recorded_backends() as ran:
        block_sparse_attention(*tensors, layout)
    assert ran == ["cpu"]
    wide = tensors_of(case, torch.float64)
    assert explain(*wide, layout).backend == "gather"
    assert "float64" in explain(*wide, layout).refused["cpu"]


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"return_lse": True}, "gives no LSE"),
        ({"key_bias": torch.zeros(1, 1, 256)}, "no key_bias"),
        ({"gradient": True}, "no backward on a CPU"),
        ({"valid": True}, "no kv_valid"),
    ],
)
def test_what_flex_cannot_do_on_a_cpu_is_refused_by_name(keywords, reason):
    layout = layout_of(Case(valid=keywords.pop("valid", False)))
    q, k, v = tensors_of(Case())
    if keywords.pop("gradient", False):
        q.requires_grad_()
    with pytest.raises(UserError, match=f"backend must be able to answer this call.*{reason}.*'flex'"):
        block_sparse_attention(q, k, v, layout, backend="flex", **keywords)
    with torch.no_grad():
        assert reason in explain(q, k, v, layout, **keywords).refused["flex"] if keywords else True


def test_flex_is_refused_in_forward_mode_and_where_compilation_is_off(monkeypatch):
    layout, (q, k, v) = layout_of(Case()), tensors_of(Case())
    with pytest.raises(UserError, match="no backward"):
        jvp(lambda q: block_sparse_attention(q, k, v, layout, backend="flex"), (q,), (q,))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    with pytest.raises(UserError, match="torch.compile is switched off"):
        block_sparse_attention(q, k, v, layout, backend="flex")


@pytest.mark.slow
def test_compiled_flex_agrees_with_the_reference():
    case = Case(heads=4, kv_heads=2, q_len=200, kv_len=300, block_k=128, lists=(1, 4))
    layout, tensors = layout_of(case), tensors_of(case)
    with recorded_backends() as ran:
        o = block_sparse_attention(*tensors, layout, backend="flex")
    assert ran == ["flex"]
    assert off(o, oracle(case, layout, tensors, None)[0]) < 1e-6


def test_flex_that_cannot_compile_says_so(monkeypatch):
    def fails(*args, **keywords):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(flex, "_compiled", lambda: fails)
    with pytest.raises(UserError, match="backend must compile.*no C\\+\\+ compiler"):
        block_sparse_attention(*tensors_of(Case()), layout_of(Case()), backend="flex")


# -- bad input


def changed(**changes):
    case = Case()
    q, k, v = tensors_of(case)
    return {"q": q, "k": k, "v": v, "layout": layout_of(case)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 256, 64)}, r"q must be \[batch, heads, tokens, width\]"),
        ({"v": None}, r"v must be \[batch, heads"),
        ({"q": torch.zeros(1, 2, 256, 64, dtype=torch.int32)}, "q must be bfloat16, float16, float32 or float64"),
        ({"k": torch.zeros(1, 2, 256, 64, dtype=torch.float64)}, "k must be torch.float32 like q"),
        ({"v": torch.zeros(1, 2, 256, 64, device="meta")}, "v must lie on cpu like q"),
        ({"k": torch.zeros(2, 2, 256, 64)}, "q, k, v must have one batch size"),
        ({"k": torch.zeros(1, 2, 256, 32)}, "k must have q's width 64, got 32"),
        ({"v": torch.zeros(1, 2, 255, 64)}, r"v must have k's heads and tokens \[2, 256\]"),
        ({"q": torch.zeros(1, 3, 256, 64)}, "k must have a number of heads that divides q's 3, got 2"),
        ({"q": torch.zeros(1, 2, 0, 64)}, "q must hold something in every dimension"),
        ({"layout": None}, "layout must be a BlockLayout, got NoneType"),
        (
            {"layout": BlockLayout.full(256, 255)},
            "layout must be for 256 queries and 256 keys, got one for 256 and 255",
        ),
        ({"layout": layout_of(Case(lists=(1, 3)))}, "layout must have 1 or 2 heads"),
        ({"layout": layout_of(Case(lists=(2, 1)))}, "layout must have 1 or 1 batches"),
        ({"scale": float("nan")}, "scale must be a finite number or None"),
        ({"scale": "1"}, "scale must be a finite number or None"),
        ({"key_bias": torch.zeros(1, 1, 255)}, r"key_bias must be float32 \[1 or 1, 1 or 2, 256\]"),
        ({"key_bias": torch.zeros(1, 1, 256).double()}, "key_bias must be float32"),
        ({"key_bias": torch.zeros(256)}, "key_bias must be float32"),
        ({"key_bias": torch.zeros(1, 1, 256, requires_grad=True)}, "key_bias must not ask for a gradient"),
        ({"backend": "cuda"}, "backend must be one of triton, cpu, gather, flex, reference, or None, got 'cuda'"),
        ({"backend": "triton"}, "backend must be able to answer this call: the tensors lie on cpu, got 'triton'"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        block_sparse_attention(**changed(**changes))
    with pytest.raises(UserError, match=message):
        explain(**changed(**changes))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_bias_that_changes_before_the_gradient_is_told(backend):
    skip_unless(backend)
    case = CASES["bias"]
    layout, bias = layout_of(case), bias_of(case)
    tensors = tuple(x.requires_grad_() for x in tensors_of(case))
    o = block_sparse_attention(*tensors, layout, case.scale, bias, backend=backend)
    bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(o.sum(), tensors)


def test_the_tangents_operator_has_shapes_for_fake_tensors():
    case = CASES["ragged"]
    layout, tensors = layout_of(case), tuple(to_meta(x) for x in tensors_of(case))
    o, lse = torch.empty(*tensors[0].shape[:3], 64, device="meta"), torch.empty(tensors[0].shape[:3], device="meta")
    lists = (to_meta(layout.kv_num), to_meta(layout.kv_idx), None, None, 64, 128, 0.3)
    found = torch.ops.diffdistill.block_sparse_attention_tangent(None, *tensors[1:], *tensors, o, lse, *lists)
    assert [x.shape for x in found] == [o.shape, lse.shape]
