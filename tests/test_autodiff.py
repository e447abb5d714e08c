"""Forward-mode derivatives against closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffdistill import UserError, autodiff
from diffdistill.autodiff import CentralDifference, Exact, jvp, moves, transforms


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_group_norm_in_any_memory_format(memory: torch.memory_format) -> None:
    """Scaling or shifting a group changes nothing; any other derivative is that of (x - mean) / std."""
    norm = nn.GroupNorm(2, 4, eps=0.0, affine=False).double()

    def by_hand(x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 2, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        return (centred / centred.square().mean(-1, keepdim=True).sqrt()).reshape(x.shape)

    x, v = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.contiguous(memory_format=memory)
    for along in (x, torch.ones_like(x)):
        assert jvp(norm, (x,), (along,))[1].abs().max() < 1e-12
    for got, wanted in zip(jvp(norm, (x,), (v,)), jvp(by_hand, (x,), (v,)), strict=True):
        torch.testing.assert_close(got, wanted)


def wavy(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) * torch.exp(t)[:, None]


def test_central_differences_are_off_by_the_square_of_their_step() -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    primals, tangents = (x, x[:, 0]), (x.flip(1), torch.ones(5, dtype=torch.float64))
    value, exact = Exact()(wavy, primals, tangents)
    errors = []
    for step in (0.04, 0.02, 0.01):
        same, near = CentralDifference(step)(wavy, primals, tangents)
        assert torch.equal(same, value)
        errors.append(float((near - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.02)


def test_the_calls_of_a_difference_share_their_dropout_masks() -> None:
    dropout = nn.Dropout(0.5)
    x = torch.ones(1, 64)
    torch.manual_seed(0)
    value, along = CentralDifference(0.1)(lambda x: dropout(x), (x,), (x,))
    torch.testing.assert_close(along, value)  # linear in x under one mask


@pytest.mark.parametrize("step", [0.0, -0.1, 1.0, float("nan")])
def test_steps_outside_zero_to_one_are_refused(step: float) -> None:
    with pytest.raises(UserError, match=r"step must lie in \(0, 1\)"):
        CentralDifference(step)


def test_derivatives_in_progress_are_told_outermost_first() -> None:
    seen = []

    def noting(x: Tensor) -> Tensor:
        seen.append(transforms())
        return x.square().sum()

    x = torch.ones(2)
    noting(x)
    jvp(noting, (x,), (x,))
    torch.func.grad(noting)(x)
    torch.func.grad(lambda x: torch.func.jvp(noting, (x,), (x,))[1])(x)
    with torch.autograd.forward_ad.dual_level():
        noting(x)
    jvp(lambda x: jvp(noting, (x,), (x,))[1], (x,), (x,))
    noting(x)
    assert seen == [(), ("Jvp",), ("Grad",), ("Grad", "Jvp"), ("Jvp",), ("Jvp", "Jvp"), ()]


def test_derivatives_of_derivatives() -> None:
    """Of x sin x: the first to the third, each taken of the one before."""
    x = torch.linspace(-2, 3, 7, dtype=torch.float64)

    def slope(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: jvp(function, (x,), (torch.ones_like(x),))[1]

    first = slope(lambda x: x * torch.sin(x))
    second = slope(first)
    third = slope(second)
    torch.testing.assert_close(first(x), torch.sin(x) + x * torch.cos(x))
    torch.testing.assert_close(second(x), 2 * torch.cos(x) - x * torch.sin(x))
    torch.testing.assert_close(third(x), -3 * torch.sin(x) - x * torch.cos(x))


def test_a_derivative_around_torch_s_transforms_and_inside_them() -> None:
    x = torch.linspace(-2, 3, 7, dtype=torch.float64)
    inner = torch.func.vmap(lambda x: jvp(torch.sin, (x,), (torch.ones_like(x),))[1])(x)
    torch.testing.assert_close(inner, torch.cos(x))
    value, tangent = jvp(torch.func.grad(lambda x: torch.sin(x).sum()), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, torch.cos(x))
    torch.testing.assert_close(tangent, -torch.sin(x))


def test_what_does_not_move_has_a_derivative_of_zero_and_structures_stay() -> None:
    x = torch.ones(3)
    (a, (b, c)), (da, (db, dc)) = jvp(lambda x: (2 * x, (x.detach() * 0 + 5, torch.arange(3.0))), (x,), (x,))
    assert torch.equal(a, 2 * x) and torch.equal(da, 2 * x)
    assert torch.equal(b, 5 * x) and torch.equal(c, torch.arange(3.0)) and torch.equal(dc, 0 * x)
    assert torch.equal(db, 0 * x)


def test_nothing_carries_a_tangent_afterwards() -> None:
    kept: list[Tensor] = []
    weight = torch.tensor(3.0, requires_grad=True)

    def keeping(x: Tensor) -> Tensor:
        kept.extend((x, weight * x))
        return kept[-1] * x

    x = torch.ones(3)
    value, tangent = jvp(keeping, (x,), (x,), graph=True)
    assert value.requires_grad and not tangent.requires_grad
    assert not any(moves(one) for one in (*kept, value, tangent))
    with torch.autograd.forward_ad.dual_level():
        assert not any(moves(one) for one in (*kept, value, tangent))


def test_after_a_failure_derivatives_are_taken_as_before() -> None:
    x = torch.ones(3)

    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"):
        jvp(failing, (x,), (x,))
    assert transforms() == ()
    assert torch.equal(jvp(torch.square, (x,), (x,))[1], 2 * x)
    assert torch.equal(torch.func.jvp(torch.square, (x,), (x,))[1], 2 * x)


def test_a_torch_without_a_count_of_levels_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    wanted = jvp(linear, (x,), (x.flip(0),))
    monkeypatch.setattr(autodiff, "eager_transforms", object())
    for one, other in zip(jvp(linear, (x,), (x.flip(0),)), wanted, strict=True):
        torch.testing.assert_close(one, other)
