"""Where a nan or inf came from: looked for once there is one, and before a checkpoint is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.distillers.base import Batch
from diffdistill.networks.roles import Networks

DATA = "batch of data"
Found = tuple[str, str]  # whose tensor it is (a role, or the data), and its name


def culprit(batch: Batch, networks: Networks, optimizers: Mapping[str, torch.optim.Optimizer]) -> Found | None:
    """The first tensor that is not finite, in the order in which one spoils the next: data, optimizers, weights.

    None if all are finite: then the loss itself is at fault.
    """
    name = _first(_inside(batch, ""))
    return (DATA, name) if name is not None else spoilt(networks, optimizers)


def spoilt(networks: Networks, optimizers: Mapping[str, torch.optim.Optimizer]) -> Found | None:
    """The same of what a checkpoint holds: optimizers, weights and their averages."""
    for role, optimizer in optimizers.items():
        if (name := _first(_states(role, networks, optimizer))) is not None:
            return role, f"optimizer state {name}"
    for role in networks.owned:
        if (name := _first(networks.named_weights(role))) is not None:
            return role, f"weight {name}"
    for role, average in networks.averages().items():
        names = [name for name, _ in networks.named_weights(role)]
        if (name := _first(zip(names, average.average, strict=True))) is not None:
            return role, f"average of {name}"
    return None


def _states(role: str, networks: Networks, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, weight in networks.named_weights(role):
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                yield f"{key} of {name}", value


def _inside(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch, by a dotted name."""
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _inside(value, f"{name}.{key}".strip("."))
    elif is_dataclass(node):
        for field in fields(node):
            if field.name != "memo":  # made from the rest
                yield from _inside(getattr(node, field.name), f"{name}.{field.name}".strip("."))


def _first(named: Any) -> str | None:
    for name, value in named:
        local = value.to_local() if hasattr(value, "to_local") else value  # of a sharded one, this process's part
        if local.is_floating_point() and not bool(local.isfinite().all()):
            return name
    return None
