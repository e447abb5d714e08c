"""What a training step of a recipe holds and computes, found by running its own steps without values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from diffdistill.bench_step import period
from diffdistill.config import build
from diffdistill.data import Data
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.base import Batch, Loss, Phase
from diffdistill.memory import optimizer_tensors
from diffdistill.networks.call import repeating_within
from diffdistill.networks.roles import Networks
from diffdistill.recipe import Recipe, assemble_parts
from diffdistill.rng import Rng
from diffdistill.shapes_only import GRADIENTS, Ledger, OnAGpu, filled, remembered
from diffdistill.stand_in import Made
from diffdistill.trainer import Trainer
from diffdistill.training_state import TrainingState

SKETCHES = 12  # steps, at least
SPREAD = ("weights", "optimizer", "averages", GRADIENTS)  # what sharding spreads over devices


@dataclass(frozen=True)
class Part:
    """Of one role. mode: copy, lora, adapter, frozen, or what it is built as.  parameters: its own; of a frozen role
    those it shares.  Bytes of its own."""

    role: str
    mode: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averages: int


@dataclass(frozen=True)
class Rehearsal:
    """parts: by role.  peak: bytes by kind on one device when most are live.  gathered: bytes of whole blocks that a
    sharded step brings together at once.  flops: of one step on one device, mean over the method's cycle, by phase.
    samples: of one step, all devices.
    """

    parts: tuple[Part, ...]
    peak: Mapping[str, float]
    gathered: float
    flops: Mapping[str, float]
    samples: int

    @property
    def bytes(self) -> float:
        """Of one device, at the peak."""
        return sum(self.peak.values()) + self.gathered

    @property
    def spread(self) -> float:
        """Of these, what more devices share."""
        return sum(self.peak.get(kind, 0.0) for kind in SPREAD)


def rehearse(settings: Mapping[str, Any], data: Data, teacher: Any, devices: int, lowered: bool) -> Rehearsal:
    """The steps of one cycle of a train configuration, on the meta device.

    data, teacher: as `recipe.assemble_parts` takes them; the teacher is used up.  devices: share weights, gradients,
    optimizers and averages evenly.  lowered: bfloat16 autocast, as CUDA's.
    """
    recipe = assemble_parts(settings, data, teacher)
    recipe = replace(recipe, data=cast("Data", Made(recipe.data)))
    trainer: Trainer = build(settings["trainer"])
    accumulate, trainer.accumulate = trainer.accumulate, 1  # one micro-batch shows what the others do
    state = trainer.start(recipe.distiller, recipe.networks)
    for optimizer in state.optimizers.values():
        filled(optimizer)
    ledger = Ledger(_held(recipe.networks, state), dict.fromkeys(SPREAD, devices))
    hooks = [
        weight.register_post_accumulate_grad_hook(ledger.is_gradient)
        for role in recipe.networks.trainable
        for weight in _trainable(recipe.networks, role)
    ]
    views = [recipe.networks[name] for name in ("teacher", *recipe.networks.roles)]
    networks: dict[int, Any] = {id(view.network): view.network for view in views if isinstance(view, Denoiser)}
    for network in networks.values():
        remembered(network, ledger)
    flops = _Steps(recipe, trainer, state, ledger, lowered, accumulate).flops()
    for hook in hooks:
        hook.remove()
    roles = dict.fromkeys(("teacher", *recipe.networks.roles))
    parts = tuple(_part(recipe.networks, state, role) for role in roles)
    # a block in use and the next one
    gathered = 0.0 if devices == 1 else 2.0 * max(_bytes(m.parameters()) for m in recipe.networks.teacher.blocks)
    samples = trainer.batch_size * accumulate * devices
    return Rehearsal(parts, ledger.peak, gathered, flops, samples)


class _Steps:
    """A recipe's steps, run under a ledger. accumulate: micro-batches of a step, of which one is run."""

    def __init__(
        self, recipe: Recipe, trainer: Trainer, state: TrainingState, ledger: Ledger, lowered: bool, accumulate: int
    ) -> None:
        self.recipe, self.trainer, self.state, self.ledger = recipe, trainer, state, ledger
        self.accumulate, self.mode = accumulate, OnAGpu(ledger, lowered)
        self.accelerator = Accelerator(cpu=True)

    def flops(self) -> dict[str, float]:
        """Mean operations of a step by phase.

        What a phase computes with gradients is the same in every step, and run once; how far it rolls out without them
        is drawn, and may depend on what other phases left for it: its mean is over sketches of steps.
        """
        phases = self.recipe.distiller.phases
        cycle = period(phases)
        whole: dict[str, tuple[int, int]] = {}
        for step in sorted(range(cycle), key=lambda step: -len(phases(step))):
            if not {phase.name for phase in phases(step)} <= whole.keys():
                whole |= self._run(step)
        self.ledger.sketching = True
        sketched = [self._sketch(step) for step in range(cycle * -(-SKETCHES // cycle))]
        total = {name: sum(step.get(name, 0) for step in sketched) for name in whole}
        share = {name: sum(name in step for step in sketched) for name in whole}
        return {
            name: self.accumulate * (share[name] * (flops - without) + total[name]) / len(sketched)
            for name, (flops, without) in whole.items()
        }

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with self.mode, self.ledger, repeating_within(lambda: self.mode):
            yield

    def _batches(self, step: int) -> list[Batch]:
        return self.trainer.batches(self.recipe.data, self.recipe.needs, self.recipe.networks, step)

    def _run(self, step: int) -> dict[str, tuple[int, int]]:
        """Operations of each phase: all, and those of network calls without gradients."""
        found, batches, ledger, networks = {}, self._batches(step), self.ledger, self.recipe.networks
        for phase in self.recipe.distiller.phases(step):
            before = ledger.flops, ledger.without_gradient
            with self._watching():
                if self.accumulate > 1:
                    self._accumulated(phase)
                self.trainer.update(
                    self._released(phase), batches, step, networks, self.state.optimizers, self.accelerator
                )
            found[phase.name] = ledger.flops - before[0], ledger.without_gradient - before[1]
        return found

    def _sketch(self, step: int) -> dict[str, int]:
        """Operations without gradients of each phase's loss."""
        found, (batch,), ledger, networks = {}, self._batches(step), self.ledger, self.recipe.networks
        for phase in self.recipe.distiller.phases(step):
            before = ledger.without_gradient
            networks.train_only(phase.trains)
            with self._watching():
                self._released(phase).loss(batch, self.trainer.rng(step, phase.name, 0, networks.device))
            found[phase.name] = ledger.without_gradient - before
        return found

    def _released(self, phase: Phase) -> Phase:
        """The phase, after whose loss autocast ends."""

        def loss(batch: Batch, rng: Rng) -> Loss:
            found = phase.loss(batch, rng)
            self.mode.forget()
            return found

        return replace(phase, loss=loss)

    def _accumulated(self, phase: Phase) -> None:
        """Gradients of micro-batches before."""
        for role in phase.trains:
            for weight in self.recipe.networks.weights(role):
                weight.grad = torch.zeros_like(weight)
                self.ledger.is_gradient(weight)


def _held(networks: Networks, state: TrainingState) -> dict[str, Iterable[torch.Tensor]]:
    frozen = [*networks.teacher.parameters(), *networks.teacher.buffers()]
    return {
        "weights": [*frozen, *(w for role in networks.owned for w in networks.weights(role))],
        "optimizer": optimizer_tensors(state.optimizers.values()),
        "averages": [tensor for average in networks.averages().values() for tensor in average.average],
    }


def _trainable(networks: Networks, role: str) -> list[nn.Parameter]:
    networks.train_only((role,))  # a hook is only taken by what requires a gradient
    return networks.weights(role)


def _part(networks: Networks, state: TrainingState, role: str) -> Part:
    others = {id(weight) for name in networks.owned for weight in networks.weights(name)}
    base = [weight for weight in networks.teacher.parameters() if id(weight) not in others]
    own = networks.weights(role) if role in networks.owned else base
    weights = _bytes(own)
    if role not in networks.owned:
        return Part(role, "frozen", _count(own), weights if role == "teacher" else 0, 0, 0, 0)
    trained = role in state.optimizers
    optimizer = _bytes(optimizer_tensors([state.optimizers[role]])) if trained else 0
    average = networks.averages().get(role)
    averages = 0 if average is None else _bytes(average.average)
    build_, mode = networks.roles[role].build, networks.modes[role]
    return Part(role, mode if build_ == "denoiser" else build_, _count(own), weights, weights if trained else 0,
                optimizer, averages)  # fmt: skip


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
