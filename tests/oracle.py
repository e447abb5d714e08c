"""Exact denoisers behind the call of a family's stock model: networks whose right reading is known.

Data: every value of a sample is -1 or 1, the one with probability .15 and the other with .85, which is which by the
condition, and without it with .5 each; plus noise of standard deviation .25.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_families import Tiny
from torch import Tensor, nn

from diffdistill.data import PROCEDURAL
from diffdistill.distillers.base import Batch
from diffdistill.process import X0, expand
from diffdistill.readings import Reading
from diffdistill.rng import Rng

STD, LIKELY = 0.25, 0.85


def posterior_mean(x: Tensor, alpha: Tensor, sigma: Tensor, sign: Tensor, factor: float, offset: float) -> Tensor:
    """E[x0 | x_t], elementwise; sign [B]: which of the two is likely, 0: none."""
    p = torch.where(sign == 0, 0.5, torch.where(sign > 0, LIKELY, 1 - LIKELY)).to(x.dtype)
    alpha, sigma, p = (expand(value, x) for value in (alpha, sigma, p))
    spread = (alpha * factor * STD).square() + sigma.square()
    means, logits = [], []
    for centre, weight in ((factor + offset, p), (offset - factor, 1 - p)):
        gap = x - alpha * centre
        means.append(centre + alpha * (factor * STD) ** 2 / spread * gap)
        logits.append(torch.log(weight) - gap.square() / (2 * spread))
    share = torch.sigmoid(logits[0] - logits[1])
    return share * means[0] + (1 - share) * means[1]


class Oracle(nn.Module):
    """In place of a stock model: called as it is, exact under `truth`. w_of: of what a scale input is fed, w."""

    def __init__(self, stock: Any, truth: Reading, w_of: Any = None, blind: bool = False) -> None:
        super().__init__()
        self.stock, self.truth, self.w_of, self.blind = stock, truth, w_of, blind
        process = truth.inputs.process
        times = torch.linspace(process.t_min, process.t_max, 20001, dtype=torch.float64)[1:-1]
        told = truth.inputs.time(times).double().numpy()
        order = np.argsort(told)
        self.told, self.times = told[order], times.numpy()[order]

    @property
    def config(self) -> Any:
        return self.stock.config

    @property
    def use_additional_conditions(self) -> bool:
        return self.stock.use_additional_conditions

    def forward(self, x: Tensor, *more: Any, **named: Any) -> tuple[Tensor]:
        told = named.get("timestep", next((v for v in more if isinstance(v, Tensor) and v.ndim == 1), None))
        text = named.get(
            "encoder_hidden_states", next((v for v in more if isinstance(v, Tensor) and v.ndim == 3), None)
        )
        t = torch.from_numpy(np.interp(told.double().numpy(), self.told, self.times)).to(x.dtype)
        if (labels := named.get("class_labels")) is not None:
            sign = torch.where(labels == self.stock.config.num_embeds_ada_norm, 0, 1 - 2 * (labels % 2))
        else:
            sign = text[:, 0, 0].sign()
        return (self._predicted(x, t, sign * (not self.blind), named.get("guidance", named.get("timestep_cond"))),)

    def _predicted(self, x: Tensor, t: Tensor, sign: Tensor, fed: Tensor | None) -> Tensor:
        inputs = self.truth.inputs
        x_t = x / expand(inputs.scale(t), x)
        alpha, sigma = inputs.process.alpha_sigma(t)
        mean = posterior_mean(x_t, alpha, sigma, sign, inputs.factor, inputs.offset)
        if fed is not None and self.w_of is not None:
            without = posterior_mean(x_t, alpha, sigma, 0 * sign, inputs.factor, inputs.offset)
            mean = without + expand(self.w_of(fed), x) * (mean - without)
        return inputs.process.convert(mean, x_t, t, X0, self.truth.kind).to(x.dtype)


@dataclass(frozen=True)
class Signs:
    """The data of the oracles, for a tiny family. stored: whether it gives samples; factor, offset: of those it gives;
    swapped: conditions and null changed places."""

    tiny: Tiny
    stored: bool = True
    factor: float = 1.0
    offset: float = 0.0
    num_classes: int = 0
    name: str = "signs"
    source: Any = PROCEDURAL

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tiny.shape

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"x0"} if self.stored else ())

    def conditions(self, rng: Rng) -> dict[str, Tensor]:
        cond = self.tiny.conditions(len(rng))
        if "text" in cond:
            cond["text"] = cond["text"] * torch.where(cond["text"][:, :1, :1] > 0, 1.0, -1.0)
            cond["text"] *= torch.where(torch.arange(len(rng)) % 2 == 0, 1.0, -1.0)[:, None, None]
        return cond

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        cond, shape = self.conditions(rng), (len(rng), *self.shape)
        if "x0" not in needs:
            return Batch(cond, shape)
        sign = 1 - 2 * (cond["label"] % 2) if "label" in cond else cond["text"][:, 0, 0].sign()
        up = rng.uniform(shape) < expand(torch.where(sign > 0, LIKELY, 1 - LIKELY), torch.zeros(shape))
        x0 = torch.where(up, 1.0, -1.0) + STD * rng.normal(shape)
        return Batch(cond, shape, (self.factor * x0 + self.offset).to(dtype))


def null_of(tiny: Tiny) -> dict[str, Tensor]:
    """No condition, as the oracles understand it."""
    if "label" in tiny.cond:
        return {"label": torch.tensor([tiny.cond["label"][0]])}
    cond = tiny.conditions(1)
    return {**cond, "text": torch.zeros_like(cond["text"])}


def oracle(tiny: Tiny, truth: Reading, schedule: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """A family's network, declared by its own scheduler or by `schedule`, whose model is exact under `truth`."""
    network: Any = tiny.network()
    if schedule is not None:
        network = type(network)(network.model, SimpleNamespace(**schedule))
    network.check(tiny.shape, network.num_classes)
    network.model = Oracle(network.model, truth, **more)
    network.null = null_of(tiny)
    return network
