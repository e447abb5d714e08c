"""fused_step: torch's own step, bit for bit, from lists that are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from diffdistill import fused_step

KINDS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda groups: AdamW(groups, lr=1e-2, fused=True),
    "Adam with decay": lambda groups: Adam(groups, lr=1e-2, fused=True, weight_decay=0.1),
    "AMSGrad": lambda groups: AdamW(groups, lr=1e-2, fused=True, amsgrad=True),
    "upwards": lambda groups: Adam(groups, lr=1e-2, fused=True, maximize=True, betas=(0.0, 0.9)),
    "one by one": lambda groups: AdamW(groups, lr=1e-2, foreach=False),
    "SGD": lambda groups: SGD(groups, lr=1e-2, momentum=0.9),
}


class Two:
    """The same network and optimizer twice: one is stepped by torch, one by us."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        ours = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
        self.networks = ours, copy.deepcopy(ours)
        self.ours, self.theirs = (KINDS[kind](self.groups(network)) for network in self.networks)

    @staticmethod
    def groups(network: nn.Module) -> list[dict[str, Any]]:
        first, *others = network.children()
        return [
            {"params": list(first.parameters()), "lr": 3e-3, "weight_decay": 0.2},
            {"params": [weight for other in others for weight in other.parameters()]},
        ]

    def step(self, rate: float = 1.0, without: tuple[int, ...] = ()) -> None:
        pairs = zip(*(network.parameters() for network in self.networks), strict=True)
        for index, (one, other) in enumerate(pairs):
            one.grad = None if index in without else torch.randn_like(one)
            other.grad = None if one.grad is None else one.grad.clone()
        for optimizer in (self.ours, self.theirs):
            for group in optimizer.param_groups:
                group["lr"] *= rate
        fused_step.step(self.ours)
        self.theirs.step()
        self.check()

    def check(self) -> None:
        for one, other in zip(*(network.parameters() for network in self.networks), strict=True):
            assert torch.equal(one, other)
            mine, wanted = self.ours.state[one], self.theirs.state[other]
            assert mine.keys() == wanted.keys()
            for name, value in wanted.items():
                assert not isinstance(value, Tensor) or torch.equal(mine[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_states_are_torch_s(kind: str) -> None:
    two = Two(kind)
    for rate in (1.0, 1.0, 0.5, 2.0):
        two.step(rate)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_without_a_gradient_stay(kind: str) -> None:
    two = Two(kind)
    for without in ((2,), (2,), (), (0, 3), (0, 1), (), ()):
        two.step(without=without)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_loaded_is_gone_on_with(kind: str) -> None:
    two = Two(kind)
    for _ in range(3):
        two.step()
    saved = copy.deepcopy(two.ours.state_dict())
    for _ in range(2):
        two.step()
    for optimizer in (two.ours, two.theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))
    for _ in range(3):
        two.step()


def test_a_group_that_was_added_is_stepped() -> None:
    two = Two("AdamW")
    two.step()
    extra = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    for weight, optimizer in zip(extra, (two.ours, two.theirs), strict=True):
        optimizer.add_param_group({"params": [weight]})
    for _ in range(3):
        for weight in extra:
            weight.grad = torch.full((4,), 2.0)
        two.step()
        assert torch.equal(*extra)
    assert extra[0].max() < 1


def stepped_by_torch(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each call of the optimizer's own step."""
    calls: list[int] = []
    own = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: calls.append(1) or own())
    return calls


def test_torch_prepares_the_first_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two("AdamW")
    calls = stepped_by_torch(two.ours, monkeypatch)
    for _ in range(4):
        two.step()
    assert len(calls) == 1


def test_hooks_are_run() -> None:
    two, seen = Two("AdamW"), list[int]()
    for _ in range(2):
        two.step()
    two.ours.register_step_post_hook(lambda *_: seen.append(1))
    for _ in range(3):
        two.step()
    assert len(seen) == 3


def test_a_subclass_has_its_own_step() -> None:
    class Counting(AdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            Counting.calls += 1
            return super().step(closure)

    weight = nn.Parameter(torch.ones(3))
    optimizer = Counting([weight], fused=True)
    for _ in range(3):
        weight.grad = torch.ones(3)
        fused_step.step(optimizer)
    assert Counting.calls == 3


def test_weights_of_two_dtypes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = AdamW(weights, fused=True)
    calls = stepped_by_torch(optimizer, monkeypatch)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        fused_step.step(optimizer)
    assert len(calls) == 2 and all(weight.max() < 1 for weight in weights)
