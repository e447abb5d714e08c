"""The Triton kernels under Triton's interpreter, against the dense reference in float64: no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, bias_of, finite, layout_of, oracle, tensors_of

pytest.importorskip("triton")

from interpreted import interpreting

from diffdistill.autodiff import jvp
from diffdistill.errors import UserError
from diffdistill.kernels.attention.api import block_sparse_attention, explain
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.operators import recorded_backends

CLOSE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(scope="module")
def launch():
    with interpreting() as module:
        yield module


@pytest.fixture(params=["tma", "pointers"])
def loads(request, launch, monkeypatch):
    """How tiles are loaded."""
    monkeypatch.setattr(launch.configs, "WITH_TMA", (90,) if request.param == "tma" else ())
    return request.param


def off(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    error = (found - wanted).norm()
    return float(error / wanted.norm()) if wanted.norm() > 0 else float(error)


def compared(case, dtype, tensors=None):
    """Errors of output, LSE and the gradients through both, on a random problem."""
    layout, bias = layout_of(case), bias_of(case)
    tensors = tuple(x.requires_grad_() for x in (tensors or tensors_of(case, dtype)))
    with recorded_backends() as ran:
        o, lse = block_sparse_attention(*tensors, layout, case.scale, bias, True, "triton")
    assert ran == ["triton"] and o.dtype == dtype and lse.dtype == torch.float32
    wide = tuple(x.detach().double().requires_grad_() for x in tensors)
    wanted = oracle(case, layout, wide, bias)
    assert o.shape == wanted[0].shape and torch.equal(lse == -torch.inf, wanted[1] == -torch.inf)
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=draw) for x in wanted]

    def loss(o, lse):
        return sum((x.double() * w).sum() for x, w in zip((o, finite(lse)), weights, strict=True))

    found, right = torch.autograd.grad(loss(o, lse), tensors), torch.autograd.grad(loss(*wanted), wide)
    assert all(g.dtype == dtype for g in found)
    pairs = [(o, wanted[0]), (finite(lse), finite(wanted[1])), *zip(found, right, strict=True)]
    return [off(*pair) for pair in pairs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loads", ["tma"], indirect=True)
def test_output_lse_and_gradients_are_the_references(loads, name):
    errors = compared(CASES[name], torch.float32)
    assert max(errors) < CLOSE[torch.float32], errors


@pytest.mark.parametrize("name", ["bias", "odd widths"])
@pytest.mark.parametrize("loads", ["pointers"], indirect=True)
def test_pointers_give_the_same_as_the_copy_engine(loads, name):
    errors = compared(CASES[name], torch.float32)
    assert max(errors) < CLOSE[torch.float32], errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bias", "odd widths"])
def test_half_precision_is_close(loads, name, dtype):
    errors = compared(CASES[name], dtype)
    assert max(errors) < CLOSE[dtype], errors


@pytest.mark.parametrize("name", ["bias", "valid counts", "nothing on"])
def test_tangents_are_the_references(loads, name):
    case = replace(CASES[name], batch=1, heads=2, kv_heads=1, lists=(1, 1), bias=(1, 2) if name == "bias" else None)
    layout, tensors, bias = layout_of(case), tensors_of(case), bias_of(case)
    directions = tensors_of(case, seed=1)

    def attend(*tensors, backend="triton"):
        return block_sparse_attention(*tensors, layout, case.scale, bias, True, backend)

    (o, lse), tangents = jvp(attend, tensors, directions)
    assert torch.equal(o, attend(*tensors)[0])
    wide = (tuple(x.double() for x in tensors), tuple(x.double() for x in directions))
    wanted = torch.func.jvp(lambda *x: attend(*x, backend="reference"), *wide)[1]
    for found, right in zip(tangents, wanted, strict=True):
        assert off(found, right) < 3e-6 and not found[lse == -torch.inf].any()


def test_a_tangent_of_one_argument_leaves_the_others_still(loads):
    case = Case(q_len=70, kv_len=130)
    layout, tensors = layout_of(case), tensors_of(case)
    for index, direction in enumerate(tensors_of(case, seed=1)):

        def attend(x, backend, index=index):
            given = [t.to(x.dtype) for t in tensors]
            given[index] = x
            return block_sparse_attention(*given, layout, backend=backend)

        found = torch.func.jvp(lambda x: attend(x, "triton"), (tensors[index],), (direction,))[1]
        wide = tensors[index].double(), direction.double()
        wanted = torch.func.jvp(lambda x: attend(x, "reference"), wide[:1], wide[1:])[1]
        assert off(found, wanted) < 3e-6


def test_reverse_over_forward_takes_a_tangent_that_has_a_gradient(launch):
    case = Case(q_len=64, kv_len=64, heads=1, kv_heads=1)
    layout, (q, k, v) = layout_of(case), tensors_of(case)

    def slope(q, backend):
        attend = lambda x: block_sparse_attention(x, k.to(x.dtype), v.to(x.dtype), layout, backend=backend)  # noqa: E731
        return torch.func.jvp(attend, (q,), (torch.ones_like(q),))[1].square().sum()

    found = torch.func.grad(lambda x: slope(x, "triton"))(q)
    assert off(found, torch.func.grad(lambda x: slope(x, "reference"))(q.double())) < 1e-5


def test_large_logits_keep_weights_and_lse_consistent(loads):
    case = CASES["plain"]
    q, k, v = tensors_of(case)
    errors = compared(case, torch.float32, (20 * q, 20 * k, v))
    assert max(errors[:2]) < 1e-4 and max(errors[2:]) < 1e-2, errors


def test_what_lies_in_slots_that_do_not_exist_is_never_read(loads):
    case = CASES["valid counts"]
    layout, (q, k, v) = layout_of(case), tensors_of(case)
    hidden = ~layout.valid_keys()
    assert bool(hidden.any())
    filled = [x.masked_fill(hidden[:, None], float("nan")) for x in (k, v)]
    leaves = [x.requires_grad_() for x in (q, *filled)]
    o = block_sparse_attention(*leaves, layout, backend="triton")
    assert off(o, block_sparse_attention(q, k, v, layout, backend="reference")) < 3e-6
    for gradient in torch.autograd.grad(o.sum(), leaves):
        assert gradient.isfinite().all()
    assert not torch.autograd.grad(block_sparse_attention(*leaves, layout, backend="triton").sum(), leaves[1])[0][
        ..., hidden, :
    ].any()


def test_every_tile_of_the_table_gives_the_same(launch, monkeypatch):
    """The interpreter runs one architecture's tiles; here it runs all shapes of tiles that any architecture has."""
    configs = launch.configs
    case = Case(q_len=140, kv_len=130, block_q=128, block_k=128, density=0.8, heads=1, kv_heads=1)
    shapes = {
        kernel: sorted({(t.m, t.n) for table in configs.TABLE.values() for row in table.values() for t in row[kernel]})
        for kernel in configs.KERNELS
    }
    for turn in range(max(map(len, shapes.values()))):
        tiles = {k: configs.Tile(*shapes[k][turn % len(shapes[k])], 4, 1) for k in configs.KERNELS}
        monkeypatch.setattr(configs, "tile", lambda *a, tiles=tiles: tiles[a[4]])
        errors = compared(case, torch.float32)
        assert max(errors) < CLOSE[torch.float32], (tiles, errors)


def test_strided_tensors_are_read_where_they_lie(loads):
    case = CASES["plain"]
    layout, tensors = layout_of(case), tensors_of(case)
    wanted = block_sparse_attention(*tensors, layout, backend="triton")
    spaced = [torch.zeros(*x.shape[:3], 100)[..., 3:67].copy_(x) for x in tensors]  # rows start at 12 bytes
    for given in (spaced, [x.expand(2, -1, -1, -1) for x in tensors]):
        assert off(block_sparse_attention(*given, layout, backend="triton")[:1], wanted) < 1e-6


def test_only_what_the_kernels_take_is_named_triton(launch):
    layout = BlockLayout.full(64, 64, 64, 64)
    x = torch.randn(1, 1, 64, 64)
    assert "triton" not in explain(x, x, x, layout).refused
    assert explain(x, x, x, layout, backend="triton").backend == "triton"
    for given, scale, why in (
        (x.double(), None, "it takes bfloat16, float16 and float32"),
        (torch.randn(1, 1, 64, 300).half(), None, "the heads are wider than 256"),
        (torch.randn(1, 1, 64, 200), None, "float32 heads are wider than 128"),
        (x, -0.5, "the scale is not positive"),
    ):
        with pytest.raises(UserError, match=f"backend must be able to answer this call: {why}"):
            block_sparse_attention(given, given, given, layout, scale, backend="triton")


def test_bfloat16_products_are_wrong_in_the_interpreter_itself(launch):
    """If this fails, upstream mended it: tiles.py can drop UPCAST."""
    import triton
    import triton.language as tl

    @triton.jit
    def multiply(A, B, C):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))

    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.zeros(16, 16)
    multiply[(1,)](a, b, c)
    assert off(c, a.double() @ b.double()) > 1


def test_the_rule_names_triton_on_a_gpu(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from diffdistill.kernels.attention.triton_kernels import support

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # another test's module may still interpret
    monkeypatch.setattr(support, "missing", lambda device: None)
    monkeypatch.setattr(support, "architecture", lambda x: 90)
    with FakeTensorMode():
        x = torch.empty(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
        lists = (torch.empty([1] * ndim, device="cuda", dtype=torch.int32) for ndim in (3, 4))
        layout = BlockLayout.trusted(64, 64, 64, 64, *lists)
        told = explain(x, x, x, layout)
        assert told.backend == "triton" and "cuda" in told.refused["cpu"]
        assert explain(x.double(), x.double(), x.double(), layout).backend == "gather"
        monkeypatch.setattr(support, "missing", lambda device: "the GPU is older than sm_80")
        told = explain(x, x, x, layout)
        assert told.backend == "gather" and "older than sm_80" in told.why
