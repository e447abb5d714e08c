"""Extra scalar inputs of a network (guidance scale w, target time s, step k), added to its time embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.networks.call import Call, current_call

NAMES = ("w", "s", "step")


def sinusoid(value: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """cos and sin of value [B] at width/2 frequencies from 1 down to 1/max_period, [B, width]."""
    half = width // 2
    power = torch.arange(half, dtype=value.dtype, device=value.device) / half
    angle = value[:, None] * torch.exp(-math.log(max_period) * power)
    return torch.cat([angle.cos(), angle.sin()], -1)


class ScalarEmbedder(nn.Module):
    """sinusoid -> linear -> SiLU -> linear, zero at first.

    Only the last linear is zero: zeroing both would leave a bias alone to train.
    """

    def __init__(self, width: int, prepare: Callable[[Tensor], Tensor], hidden: int = 64) -> None:
        super().__init__()
        self.prepare, self.hidden = prepare, hidden
        self.first = nn.Linear(hidden, width)
        self.last = nn.Linear(width, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, value: Tensor) -> Tensor:
        features = sinusoid(self.prepare(value.to(self.first.weight.dtype)), self.hidden)
        return self.last(nn.functional.silu(self.first(features)))


class EmbeddingWithInputs(nn.Module):
    """A time embedding [B, width] plus the embedded extra inputs of the role in progress."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.roles = nn.ModuleDict()

    def add(self, role: str, names: tuple[str, ...], width: int) -> nn.ModuleDict:
        """Embedders of `role`: s comes through the network's own time map, w is scaled by 1000 as in LCM."""
        prepare: dict[str, Callable[[Tensor], Tensor]] = {"s": _same, "w": _thousandfold, "step": _same}
        unknown = [name for name in names if name not in NAMES]
        if unknown:
            raise UserError("inputs", f"must be among {NAMES}", unknown, "Use one of these names.")
        embedders = nn.ModuleDict({name: ScalarEmbedder(width, prepare[name]) for name in names})
        reference = next(self.base.parameters())
        self.roles[role] = embedders.to(reference.device, reference.dtype)
        return embedders

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        embedding = self.base(*args, **kwargs)
        call = current_call()
        if call is None:
            return embedding
        if call.parts:
            pieces = [self._with_inputs(part, embedding[rows]) for part, rows in call.rows(len(embedding))]
            return torch.cat(pieces)
        return self._with_inputs(call, embedding)

    def _with_inputs(self, call: Call, embedding: Tensor) -> Tensor:
        if call.role not in self.roles:
            return embedding
        for name, embedder in self.roles[call.role].items():  # type: ignore[operator]
            value = getattr(call, name)
            if value is None:
                raise ValueError(f"role {call.role} reads the extra input {name}, but cond has no {name} [B].")
            embedding = embedding + embedder(value).to(embedding.dtype)
        return embedding


@torch.no_grad()
def fold_inputs(embedding: EmbeddingWithInputs, role: str, values: Mapping[str, Tensor]) -> nn.Module:
    """The plain time embedding of `role`, its inputs held at `values` [1] and folded into its last bias, in place.

    s is given as the network's time map has it. Values that the role does not read are ignored.
    """
    base = embedding.base
    last = [module for module in base.modules() if isinstance(module, nn.Linear)][-1]
    if role in embedding.roles:
        for name, embedder in embedding.roles[role].items():  # type: ignore[operator]
            last.bias.add_(embedder(values[name])[0].to(last.bias.dtype))
    return base


def _thousandfold(w: Tensor) -> Tensor:
    return 1000 * w


def _same(value: Tensor) -> Tensor:
    return value
