"""Low-rank adapters on a shared frozen backbone, chosen by the role of the Call in progress.

Hu et al. 2021, arXiv:2106.09685. PEFT's adapters are switched by global state that also flips requires_grad, so a
backward pass after another role ran finds no gradient; here the forward pass alone decides, by the Call.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.networks.call import current_call
from diffdistill.networks.tamed import TamedLinear


@dataclass(frozen=True)
class LoraSpec:
    """rank: of the update.  alpha: its scale is alpha / rank.  targets: regular expressions on module names; None
    adapts every linear and convolution."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError("lora.rank", "must be >= 1", self.rank, "Typical values: 8 to 128.")


class LoraLayer(nn.Module):
    """A linear or convolution with one low-rank update per role that has one; other roles see the base alone."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.ModuleDict()
        self.up = nn.ModuleDict()
        self.scales: dict[str, float] = {}

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def add(self, role: str, spec: LoraSpec) -> None:
        """Give `role` an update that is zero at first (its second factor is)."""
        base, device = self.base, self.base.weight.device
        if isinstance(base, nn.Conv2d):
            geometry = (base.kernel_size, base.stride, base.padding, base.dilation)
            down: nn.Module = nn.Conv2d(base.in_channels, spec.rank, *geometry, bias=False, device=device)
            up: nn.Module = nn.Conv2d(spec.rank, base.out_channels, 1, bias=False, device=device)
        else:
            down = nn.Linear(base.in_features, spec.rank, bias=False, device=device)
            up = nn.Linear(spec.rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(up.weight)  # type: ignore[arg-type]
        # adapters train in float32, or wider where the base is
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.down[role], self.up[role] = down.to(dtype), up.to(dtype)
        self.scales[role] = spec.alpha / spec.rank

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        call = current_call()
        if call is None or call.role not in self.down:
            return out
        seen = x * self.base.keep if isinstance(self.base, TamedLinear) else x  # held columns stay held
        update = self.up[call.role](self.down[call.role](seen.to(self.down[call.role].weight.dtype)))
        return out + (self.scales[call.role] * update).to(out.dtype)

    @torch.no_grad()
    def merged(self, role: str) -> nn.Linear | nn.Conv2d:
        """A plain layer with the role's update folded into the weight."""
        layer = copy.deepcopy(self.base)
        if role in self.down:
            down, up = self.down[role].weight, self.up[role].weight
            delta = torch.einsum("or...,ri...->oi...", up.flatten(1), down)
            layer.weight += (self.scales[role] * delta).to(layer.weight.dtype)
        return layer


def adapt(network: nn.Module, role: str, spec: LoraSpec) -> list[LoraLayer]:
    """Give `role` an adapter on every targeted layer of `network` (in place); returns the layers, in module order."""
    chosen = []
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            layer = module
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            if name.endswith(".base"):
                continue
            layer = LoraLayer(module)
        else:
            continue
        if re.search(r"\.(down|up)\.[^.]+$", name) and isinstance(_parent(network, name, 2), LoraLayer):
            continue
        if spec.targets is not None and not any(re.search(target, name) for target in spec.targets):
            continue
        if layer is not module:
            setattr(_parent(network, name, 1), name.rsplit(".", 1)[-1], layer)
        layer.add(role, spec)
        chosen.append(layer)
    if not chosen:
        raise UserError(
            "lora.targets", "must match a linear or convolution", spec.targets, f"Names: {_examples(network)}"
        )
    return chosen


def merge(network: nn.Module, role: str) -> None:
    """Replace every LoraLayer of `network` (in place) by a plain layer with the role's update folded in."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            setattr(_parent(network, name, 1), name.rsplit(".", 1)[-1], module.merged(role))


def _parent(network: nn.Module, name: str, levels: int) -> nn.Module:
    parts = name.split(".")[:-levels]
    return network.get_submodule(".".join(parts))


def _examples(network: nn.Module) -> str:
    def names() -> Iterator[str]:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield name

    return ", ".join(list(names())[:8])
