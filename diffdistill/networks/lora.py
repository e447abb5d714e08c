"""Low-rank adapters on a shared frozen backbone, chosen by the role of the Call in progress.

Hu et al. 2021, arXiv:2106.09685. PEFT's adapters are switched by global state that also flips requires_grad, so a
backward pass after another role ran finds no gradient; here the forward pass alone decides, by the Call.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError, require_positive
from diffdistill.networks.call import current_call
from diffdistill.networks.inputs import EmbeddingWithInputs
from diffdistill.networks.tamed import TamedLinear
from diffdistill.process import wide


@dataclass(frozen=True)
class LoraSpec:
    """rank: of the update.  alpha: its scale is alpha / rank.  targets: regular expressions on module names; None
    adapts every linear and convolution."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError("rank", "must be >= 1", self.rank, "Typical values: 8 to 128.")
        require_positive(alpha=self.alpha)
        for target in self.targets or ():
            try:
                re.compile(target)
            except re.error as error:
                fix = f"{str(error).capitalize()}."
                raise UserError("targets", "must be regular expressions", repr(target), fix) from error


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
            geometry: Any = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation")}
            down: nn.Conv2d | nn.Linear = nn.Conv2d(base.in_channels, spec.rank, bias=False, device=device, **geometry)
            up: nn.Conv2d | nn.Linear = nn.Conv2d(spec.rank, base.out_channels, 1, bias=False, device=device)
        else:
            down = nn.Linear(base.in_features, spec.rank, bias=False, device=device)
            up = nn.Linear(spec.rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(up.weight)
        # adapters train in float32, or wider where the base is
        dtype = wide(base.weight.dtype)
        self.down[role], self.up[role] = down.to(dtype), up.to(dtype)
        self.scales[role] = spec.alpha / spec.rank

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        call = current_call()
        if call is None:
            return out
        if call.parts:
            return call.added(out, lambda part, rows: self._update(part.role, x[rows], out.dtype))
        update = self._update(call.role, x, out.dtype)
        return out if update is None else out + update

    def _update(self, role: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What the role adds for inputs x, None if it has no update."""
        if role not in self.down:
            return None
        seen = x * self.base.keep if isinstance(self.base, TamedLinear) else x  # held columns stay held
        down, up = self.factors(role)
        return (self.scales[role] * up(down(seen.to(down.weight.dtype)))).to(dtype)

    def factors(self, role: str) -> tuple[Any, Any]:
        """The two layers of the role's update, down and up."""
        return self.down[role], self.up[role]

    @torch.no_grad()
    def merged(self, role: str) -> nn.Linear | nn.Conv2d:
        """A plain layer with the role's update folded into the weight."""
        layer = copy.deepcopy(self.base)
        if role in self.down:
            down, up = self.factors(role)
            delta = torch.einsum("or...,ri...->oi...", up.weight.flatten(1), down.weight)
            layer.weight += (self.scales[role] * delta).to(layer.weight.dtype)
        return layer


def adapt(network: nn.Module, role: str, spec: LoraSpec) -> list[LoraLayer]:
    """Give `role` an adapter on every targeted layer of `network` (in place); returns the layers, in module order."""
    chosen = []
    added = _added(network)
    # the names modules had before extra inputs wrapped the time embedding
    wrapped = [name for name, module in network.named_modules() if isinstance(module, EmbeddingWithInputs)]
    for name, module in list(network.named_modules()):
        if module in added:
            continue
        if isinstance(module, LoraLayer):
            layer = module
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            layer = LoraLayer(module)
        else:
            continue
        plain = next((w + name.removeprefix(f"{w}.base") for w in wrapped if name.startswith(f"{w}.base")), name)
        if spec.targets is not None and not any(re.search(target, plain) for target in spec.targets):
            continue
        if layer is not module:
            setattr(_parent(network, name), name.rsplit(".", 1)[-1], layer)
        layer.add(role, spec)
        layer.train(layer.base.training)  # new modules begin in train mode, a frozen backbone is not in it
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
            setattr(_parent(network, name), name.rsplit(".", 1)[-1], module.merged(role))


def base_state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A backbone's own weights, by the names they had before adapters and extra inputs of roles joined it."""
    wrapped = [name for name, module in network.named_modules() if isinstance(module, LoraLayer | EmbeddingWithInputs)]
    added = tuple(f"{name}.{part}." for name in wrapped for part in ("down", "up", "roles"))
    for name, value in network.state_dict().items():
        if name.startswith(added):
            continue
        for outer in sorted(wrapped, key=len, reverse=True):
            if name.startswith(f"{outer}.base."):
                name = f"{outer}.{name.removeprefix(f'{outer}.base.')}"
        yield name, value


def _added(network: nn.Module) -> set[nn.Module]:
    """What lies inside adapted layers, and the embedders of extra inputs: none of it gets an adapter."""
    inside: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, LoraLayer):
            inside.update(list(module.modules())[1:])
        elif isinstance(module, EmbeddingWithInputs):
            inside.update(module.roles.modules())
    return inside


def _parent(network: nn.Module, name: str) -> nn.Module:
    return network.get_submodule(name.rpartition(".")[0])


def _examples(network: nn.Module) -> str:
    def names() -> Iterator[str]:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield name

    return ", ".join(list(names())[:8])
