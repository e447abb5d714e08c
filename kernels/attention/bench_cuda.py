"""`diffdistill bench attention device=cuda`: the Triton kernels against torch's dense kernels and flex.

Every contestant goes through its public call, forward or backward alone, in interleaved rounds timed by GPU events.
The ceiling is what torch's own product of two 8192 x 8192 matrices reaches in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.errors import UserError
from diffdistill.kernels.attention.api import block_sparse_attention
from diffdistill.kernels.attention.bench_runners import DTYPES, Group, Runner, layout_of
from diffdistill.kernels.attention.converters import to_flex
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.triton_kernels import support

HEADS = 16
DENSITIES = (1.0, 0.3, 0.1)
SQUARE = 8192
BATCH_SECONDS = 0.01  # of one timing: calls are repeated to fill it
SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def check() -> None:
    """Refuse a machine without a GPU that our kernels take."""
    missing = support.missing(None) if torch.cuda.is_available() else "torch finds none"
    if missing is not None:
        fix = "Run it on a machine with a GPU from sm_80 on, or say device=cpu."
        raise UserError("device", "must be a GPU that the kernels take", f"cuda: {missing}", fix)


def groups(quick: bool) -> list[Group]:
    """quick: one length and width."""
    sizes = ((16384, 128),) if quick else ((8192, 64), (8192, 128), (32768, 64), (32768, 128))
    bf16 = ("sdpa_flash", "sdpa_cudnn", "flex")
    found = [Group(n, width, "bf16", d, DENSITIES, bf16) for n, width in sizes for d in ("forward", "backward")]
    if not quick:
        found += [
            Group(8192, width, "fp32", d, DENSITIES, ("sdpa_efficient", "flex"))
            for width in (64, 128)
            for d in ("forward", "backward")
        ]
    return found


def runners(group: Group) -> list[Runner]:
    """Dense attention once, the others per density."""
    torch.manual_seed(0)
    shape = (1, HEADS, group.length, group.width)
    tensors = [torch.randn(shape, device="cuda", dtype=DTYPES[group.dtype]) for _ in range(4)]
    per_score = (4 if group.direction == "forward" else 10) * group.width * group.length**2 * HEADS
    found = []
    for name in ("ours", *group.rivals):
        for density in (1.0,) if name in SDPA else group.densities:
            layout = layout_of(group.length, density).to("cuda")
            try:
                call = _call(group.direction, _attention(name, layout), tensors)
                call()
            except Exception as error:  # a rival may lack a kernel for this GPU or run out of its shared memory
                if name == "ours" and not isinstance(error, UserError):  # which says what it does not take
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                print(f"{name}, density {layout.density:.2f}, left out: {reason}")
                continue
            found.append(Runner(name, layout.density, per_score * layout.density, call))
    return found


def rate(group: Group) -> float:
    """Operations per second of a large product, 0 for float32: torch has none that is as exact on tensor cores."""
    if group.dtype != "bf16":
        return 0.0
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)
    return 2 * SQUARE**3 / seconds(lambda: torch.mm(a, b))


def seconds(call: Callable[[], object]) -> float:
    """Of one call, over as many as fill BATCH_SECONDS."""
    once = _elapsed(call, 1)
    return _elapsed(call, max(1, round(BATCH_SECONDS / once)))


def facts() -> dict[str, Any]:
    """Of the GPU, beside what is known of the machine."""
    import triton

    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"sm_{major}{minor}",
        "triton": triton.__version__,
        "host_microseconds": round(host_microseconds(), 1),
    }


def host_microseconds(repeats: int = 200) -> float:
    """What a forward call costs the host, on a problem that costs the GPU nothing."""
    q, k, v = (torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout = BlockLayout.full(64, 64, 64, 64, device="cuda")
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        block_sparse_attention(q, k, v, layout)
        taken.append(time.perf_counter() - started)
        torch.cuda.synchronize()
    return 1e6 * statistics.median(taken)


def _elapsed(call: Callable[[], object], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / times


def _attention(name: str, layout: BlockLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == "ours":
        return lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="triton")
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        compiled, block_mask = torch.compile(flex_attention, dynamic=False, fullgraph=True), to_flex(layout)
        return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v)

    return dense


def _call(
    direction: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]
) -> Callable[[], object]:
    q, k, v, d_o = tensors
    if direction == "forward":
        return lambda: attend(q, k, v)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = attend(q, k, v)
    return lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)
