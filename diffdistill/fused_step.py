"""The step of torch's fused Adam without what Python spends on preparing it.

At every step torch gathers the lists of its kernel anew, sorts them by device and dtype, and counts the step of each
weight by itself: twice the kernel's own time for 35 small weights on a CPU. Here the lists are kept, and one addition
counts all steps, whose tensors become views of one. The kernel and its arguments are torch's, so are weights and
states, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from diffdistill.shards import is_sharded


@torch.no_grad()
def step(optimizer: Optimizer) -> None:
    """`optimizer.step()`, by the lists of the step before where it is a fused Adam and nothing about it has changed."""
    plan = _PLANS.get(optimizer)
    if plan is not None and (gradients := plan.gradients(optimizer)) is not None:
        plan.step(optimizer, gradients)
        return
    optimizer.step()
    if _is_fused(optimizer) and all(_is_uniform(group["params"]) for group in optimizer.param_groups):
        _PLANS[optimizer] = _Plan.of(optimizer)


@dataclass
class _Group:
    """Of one parameter group: weights that have a state, those that have none yet, and the states by name."""

    weights: list[Tensor]
    others: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    largest: list[Tensor]
    steps: Tensor
    views: list[Tensor]

    @classmethod
    def of(cls, group: dict[str, Any], state: Any) -> _Group:
        weights = [weight for weight in group["params"] if state.get(weight)]
        others = [weight for weight in group["params"] if not state.get(weight)]
        states = [state[weight] for weight in weights]
        steps = torch.stack([own["step"] for own in states]) if states else torch.zeros(0)
        views = list(steps.unbind())
        for own, view in zip(states, views, strict=True):
            own["step"] = view
        largest = [own["max_exp_avg_sq"] for own in states] if group["amsgrad"] else []
        first, second = ([own[name] for own in states] for name in ("exp_avg", "exp_avg_sq"))
        return cls(weights, others, first, second, largest, steps, views)

    def gradients(self) -> list[Tensor] | None:
        """One for each weight, or None if it is not these weights that have one now."""
        found = [weight.grad for weight in self.weights]
        if any(gradient is None for gradient in found) or any(weight.grad is not None for weight in self.others):
            return None
        return found  # type: ignore[return-value]


@dataclass
class _Plan:
    """The lists of an optimizer, and the groups from which they came: `load_state_dict` makes new ones."""

    param_groups: list[dict[str, Any]]
    sizes: list[int]
    groups: list[_Group]

    @classmethod
    def of(cls, optimizer: Optimizer) -> _Plan:
        groups = optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        return cls(groups, sizes, [_Group.of(group, optimizer.state) for group in groups])

    def gradients(self, optimizer: Optimizer) -> list[list[Tensor]] | None:
        """By group; None where torch has to look for itself."""
        same = self.param_groups is optimizer.param_groups
        if not same or self.sizes != [len(group["params"]) for group in self.param_groups] or not _is_fused(optimizer):
            return None
        found = [group.gradients() for group in self.groups]
        return None if any(one is None for one in found) else found  # type: ignore[return-value]

    def step(self, optimizer: Optimizer, gradients: list[list[Tensor]]) -> None:
        for own, group, given in zip(self.groups, self.param_groups, gradients, strict=True):
            if not own.weights:
                continue
            decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
            own.steps.add_(1)
            (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
                own.weights,
                given,
                own.first,
                own.second,
                own.largest,
                own.views,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
                grad_scale=None,
                found_inf=None,
            )


_PLANS: WeakKeyDictionary[Optimizer, _Plan] = WeakKeyDictionary()


def _is_fused(optimizer: Optimizer) -> bool:
    """Whether its step is torch's fused kernel and nothing else: a subclass, hooks or rates in tensors are more."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if type(optimizer) not in (Adam, AdamW) or hooks:
        return False
    return all(group["fused"] and not isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


def _is_uniform(weights: list[Tensor]) -> bool:
    """Whether one call of the kernel takes them: whole, with dense gradients, of one device and dtype."""
    sparse = any(weight.grad is not None and weight.grad.layout != torch.strided for weight in weights)
    kinds = {(weight.device, weight.dtype) for weight in weights}
    return len(kinds) == 1 and not sparse and not any(is_sharded(weight) for weight in weights)
