"""Exponential moving averages of a role's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.shards import parts

Rate = Callable[[int], float]  # number of the update (1, 2, ...) -> share of the old average that stays


@dataclass(frozen=True)
class Constant:
    """The same decay at every update, in [0, 1). 1 / (1 - decay) updates is the averaging horizon."""

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError("decay", "must lie in [0, 1)", self.decay, "Typical values: .99 to .9999.")

    def __call__(self, update: int) -> float:
        return self.decay


@dataclass(frozen=True)
class Power:
    """Decay (1 - 1/k)^(gamma + 1) at update k: a horizon that grows. Karras et al. 2023, arXiv:2312.02696."""

    gamma: float

    def __post_init__(self) -> None:
        if not 0 < self.gamma < float("inf"):
            raise UserError("gamma", "must be > 0", self.gamma, "EDM2 uses 6.94 (horizon 10%) and 16.97 (5%).")

    def __call__(self, update: int) -> float:
        return (1 - 1 / update) ** (self.gamma + 1)


class Ema:
    """An average of `source` held in `average`, tensors of equal shapes; `average` starts as a copy of `source`."""

    def __init__(self, source: Sequence[Tensor], rate: Rate, average: Sequence[Tensor] | None = None) -> None:
        self.rate = rate
        self.over(source, [p.detach().clone() for p in source] if average is None else average)
        self.restart()

    def over(self, source: Sequence[Tensor], average: Sequence[Tensor]) -> None:
        """Go on with these tensors in place of the ones before, which they hold."""
        self.source, self.average = list(source), [p.detach() for p in average]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the source once."""
        self.updates += 1
        keep = self.rate(self.updates)
        torch._foreach_lerp_(parts(self.average), parts(self.source), 1 - keep)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the source as it is."""
        self.updates = 0
        torch._foreach_copy_(parts(self.average), parts(self.source))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the context the source tensors hold the average."""
        live = [p.clone() for p in parts(self.source)]
        with torch.no_grad():
            torch._foreach_copy_(parts(self.source), parts(self.average))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parts(self.source), live)
