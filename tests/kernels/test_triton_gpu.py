"""The Triton kernels on a GPU: skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, bias_of, finite, layout_of, oracle, tensors_of
from torch.utils.checkpoint import checkpoint

from diffdistill.autodiff import jvp
from diffdistill.kernels.attention.api import block_sparse_attention, explain
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.operators import recorded_backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["copy engine", "pointers"])
def loads(request, monkeypatch):
    """How tiles are loaded."""
    from diffdistill.kernels.attention.triton_kernels import configs

    if request.param == "pointers":
        monkeypatch.setattr(configs, "WITH_TMA", ())
    elif configs.architecture(torch.cuda.get_device_capability()) not in configs.WITH_TMA:
        pytest.skip("this GPU's tiles come by pointers")


def off(found, wanted):
    found, wanted = found.detach().double().cpu(), wanted.detach().double()
    error = (found - wanted).norm()
    return float(error / wanted.norm()) if wanted.norm() > 0 else float(error)


def on_gpu(case, tensors):
    """Copies with the case's strides."""
    if case.interleaved:
        return tuple(x.transpose(1, 2).contiguous().cuda().transpose(1, 2) for x in tensors)
    return tuple(x.cuda() for x in tensors)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_tangents_are_the_references(name, dtype, loads):
    case = CASES[name]
    layout, bias = layout_of(case), bias_of(case)
    tensors, directions = tensors_of(case, dtype), tensors_of(case, dtype, seed=1)
    wide = tuple(x.double().requires_grad_() for x in tensors)
    given = tuple(x.requires_grad_() for x in on_gpu(case, tensors))
    there, its_bias = layout.to("cuda"), None if bias is None else bias.cuda()

    def attend(*x):
        return block_sparse_attention(*x, there, case.scale, its_bias, True)

    assert explain(*given, there, case.scale, its_bias).backend == "triton"
    with recorded_backends() as ran:
        o, lse = attend(*given)
    assert ran == ["triton"] and o.dtype == dtype and lse.dtype == torch.float32
    wanted = oracle(case, layout, wide, bias)
    assert torch.equal((lse == -torch.inf).cpu(), wanted[1] == -torch.inf)
    assert off(o, wanted[0]) < CLOSE[dtype] and off(finite(lse), finite(wanted[1])) < 1e-5

    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=draw) for x in wanted]

    def loss(o, lse):
        return sum((x.double() * w.to(x.device)).sum() for x, w in zip((o, finite(lse)), weights, strict=True))

    right = torch.autograd.grad(loss(*wanted), wide)
    for found, exact in zip(torch.autograd.grad(loss(o, lse), given), right, strict=True):
        assert found.dtype == dtype and off(found, exact) < CLOSE[dtype]

    detached = tuple(x.detach() for x in given)
    tangents = jvp(attend, detached, on_gpu(case, directions))[1]
    exact = torch.func.jvp(
        lambda *x: block_sparse_attention(*x, layout, case.scale, bias, True, "reference"),
        tuple(x.detach() for x in wide),
        tuple(x.double() for x in directions),
    )[1]
    assert off(tangents[0], exact[0]) < CLOSE[dtype] and off(tangents[1], exact[1]) < CLOSE[dtype]


def problem(length=1024, width=64, dtype=torch.bfloat16):
    draw = torch.Generator("cuda").manual_seed(0)
    mask = torch.rand(1, 4, length // 64, length // 64, device="cuda", generator=draw) < 0.3
    tensors = (torch.randn(2, 4, length, width, device="cuda", generator=draw).to(dtype) for _ in range(3))
    return BlockLayout.from_mask(mask, length, length, 64, 64), *tensors


def test_runs_repeat_bit_for_bit():
    layout, *tensors = problem()
    tensors = [x.requires_grad_() for x in tensors]
    runs = []
    for _ in range(3):
        o = block_sparse_attention(*tensors, layout)
        runs.append((o, *torch.autograd.grad(o.float().square().sum(), tensors)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_compiled_and_checkpointed_code_gives_the_same():
    layout, *tensors = problem()
    tensors = [x.requires_grad_() for x in tensors]

    def attend(*x):
        return block_sparse_attention(*x, layout).float().square().sum()

    wanted = torch.autograd.grad(attend(*tensors), tensors)
    for way in (torch.compile(attend, fullgraph=True), lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        for found, right in zip(torch.autograd.grad(way(*tensors), tensors), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-2, atol=1e-3)


def test_a_mask_and_its_attention_never_wait_for_the_gpu():
    layout, *tensors = problem()
    tensors = [x.requires_grad_() for x in tensors]
    mask = layout.to_mask()
    block_sparse_attention(*tensors, layout).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = BlockLayout.from_mask(mask, layout.q_len, layout.kv_len, 64, 64)
        block_sparse_attention(*tensors, again).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_it():
    layout, *tensors = problem()
    for _ in range(2):
        block_sparse_attention(*tensors, layout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = block_sparse_attention(*tensors, layout)
    tensors[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(o, block_sparse_attention(*tensors, layout))


def test_offsets_beyond_32_bits():
    length, heads = 65536, 300
    q, k, v = (torch.zeros(1, heads, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    v[0, -1, -64:] = 1
    mask = torch.zeros(length // 64, length // 64, dtype=torch.bool, device="cuda")
    mask[:, -1] = True
    o = block_sparse_attention(q, k, v, BlockLayout.from_mask(mask, length, length, 64, 64))
    assert bool((o[0, -1] == 1).all()) and not bool(o[0, 0].any())
