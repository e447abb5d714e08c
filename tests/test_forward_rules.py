"""Forward-mode rules of layers against torch's own, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill import autodiff, forward_rules
from diffdistill.autodiff import jvp

torch.manual_seed(0)
D = torch.float64
WEIGHT, BIAS = torch.randn(6, 8, dtype=D), torch.randn(6, dtype=D)
KERNEL, OFFSET = torch.randn(4, 4, 3, 3, dtype=D), torch.randn(4, dtype=D)
ROW, NUMBER = torch.randn(8, dtype=D), 0.7
MAP = torch.randn(5, 8, 4, 4, dtype=D)

CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda x: F.linear(x, WEIGHT, BIAS), (5, 8)),
    "linear without bias": (lambda x: F.linear(x, WEIGHT), (5, 8)),
    "linear by name": (lambda x: F.linear(input=x, weight=WEIGHT, bias=BIAS), (5, 8)),
    "linear in its weight": (lambda x: F.linear(ROW.expand(5, 8), x, BIAS), (6, 8)),
    "convolution": (lambda x: F.conv2d(x, KERNEL, OFFSET, stride=2, padding=1), (5, 4, 8, 8)),
    "convolution in groups": (lambda x: F.conv2d(x, KERNEL[:, :2], OFFSET, groups=2), (5, 4, 8, 8)),
    "convolution 1d": (lambda x: F.conv1d(x, KERNEL[..., 0], OFFSET), (5, 4, 8)),
    "convolution 3d": (lambda x: F.conv3d(x, KERNEL[..., None], None), (2, 4, 5, 5, 2)),
    "convolution in its kernel": (lambda x: F.conv2d(MAP[:, :4], x, OFFSET), (4, 4, 3, 3)),
    "group norm": (lambda x: F.group_norm(x, 2, ROW, ROW), (5, 8, 4, 4)),
    "group norm of channels last": (
        lambda x: F.group_norm(x.to(memory_format=torch.channels_last), 4, ROW, None, 1e-3), (5, 8, 4, 4)
    ),
    "group norm of tokens": (lambda x: F.group_norm(x, 2), (5, 8, 7)),
    "layer norm": (lambda x: F.layer_norm(x, (8,), ROW, ROW), (5, 3, 8)),
    "layer norm without weights": (lambda x: F.layer_norm(x, (8,), eps=1e-2), (5, 8)),
    "layer norm over two": (lambda x: F.layer_norm(x, (3, 8)), (5, 3, 8)),
    "sum": (lambda x: (x + ROW) + (ROW + x) + (x + NUMBER) + (NUMBER + x) + torch.add(x, ROW, alpha=3), (5, 8)),
    "sum that is wider": (lambda x: x + torch.ones(5, 8, dtype=D), (8,)),
    "difference": (lambda x: (x - ROW) * 2 + (ROW - x) * 3 + (x - NUMBER) * 5 + (NUMBER - x) * 7, (5, 8)),
    "product": (lambda x: (x * ROW) * (ROW * x) + NUMBER * x + x * NUMBER, (5, 8)),
    "quotient": (lambda x: x / ROW + ROW / x + x / NUMBER + NUMBER / x + x / x, (5, 8)),
    "hypotenuse": (lambda x: torch.hypot(x, ROW) + torch.hypot(ROW, x) + torch.hypot(x, x), (5, 8)),
    "angle": (lambda x: torch.atan2(x, ROW) + torch.atan2(ROW, x) + torch.atan2(x, 2 * x), (5, 8)),
    "of itself": (lambda x: x * x + x - x, (5, 8)),
    "in place to a sum": (lambda x: (x + ROW).mul_(2) + x + (NUMBER + x).mul_(3) + x, (5, 8)),
    "in place to a difference": (lambda x: (x - ROW).mul_(2) + x, (5, 8)),
    "in place": (lambda x: (x * 1).add_(ROW).mul_(2), (5, 8)),
}  # fmt: skip


def by_torch(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    mended = autodiff._ContiguousGroupNorm() if autodiff._MENDED else contextlib.nullcontext()
    with torch.no_grad(), mended:
        return torch.func.jvp(function, primals, tangents)


@pytest.mark.parametrize("name", CASES)
def test_values_and_tangents_are_torch_s(name: str) -> None:
    function, shape = CASES[name]
    x, v = torch.randn(shape, dtype=D), torch.randn(shape, dtype=D)
    for ours, theirs in zip(jvp(function, (x,), (v,)), by_torch(function, (x,), (v,)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype


@pytest.mark.parametrize("name", ["linear", "group norm", "layer norm", "product", "convolution"])
def test_rules_hold_inside_a_second_derivative(name: str) -> None:
    function, shape = CASES[name]
    x, v, u = (torch.randn(shape, dtype=D) for _ in range(3))

    def first(taken: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: taken(lambda y: function(y * y), (x,), (v,))[1]

    ours, theirs = jvp(first(jvp), (x,), (u,)), by_torch(first(by_torch), (x,), (u,))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert theirs[1].abs().max() > 0


@pytest.mark.parametrize("name", ["linear", "convolution", "group norm", "layer norm", "sum", "product", "quotient"])
def test_the_rule_is_what_ran(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, shape = CASES[name]
    x = torch.randn(shape, dtype=D)
    applied = []
    rules = {key: lambda *a, _rule=rule, **k: applied.append(_rule(*a, **k)) or applied[-1] for key, rule in
             forward_rules.RULES.items()}  # fmt: skip
    monkeypatch.setattr(forward_rules, "RULES", rules)
    jvp(function, (x,), (x,))
    assert any(found is not NotImplemented for found in applied)


def test_a_network_of_diffusers_has_torch_s_tangent() -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, num_class_embeds=3,
    ).double().eval()  # fmt: skip
    labels = torch.tensor([0, 1])

    def function(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, t, class_labels=labels, return_dict=False)[0]

    primals = torch.randn(2, 1, 8, 8, dtype=D), torch.tensor([3.0, 40.0], dtype=D)
    ours = jvp(function, primals, primals)
    rules, autodiff.Rules = autodiff.Rules, contextlib.nullcontext  # type: ignore[misc,assignment]
    try:
        theirs = jvp(function, primals, primals)
    finally:
        autodiff.Rules = rules  # type: ignore[misc]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # it embeds its times in float32
    assert theirs[1].abs().max() > 0


def test_under_autocast_norms_are_torch_s() -> None:
    norm, x = nn.GroupNorm(2, 8), torch.randn(3, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = jvp(norm, (x,), (x,)), by_torch(norm, (x,), (x,))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)  # of one dtype
