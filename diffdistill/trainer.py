"""The training loop: executes the phases a method returns; knows no method by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffdistill.data import Data
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, Transition
from diffdistill.errors import UserError
from diffdistill.memory import PeakBytes, optimizer_tensors
from diffdistill.networks.ema import Rate
from diffdistill.networks.roles import Networks
from diffdistill.rng import Rng

Schedule = Callable[[int, int], float]  # (step, steps) -> factor on the learning rate


@dataclass(frozen=True)
class ConstantLR:
    """Full rate after `warmup` steps of linear rise."""

    warmup: int = 0

    def __call__(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class CosineLR:
    """Linear rise over `warmup` steps, then half a cosine down to the share `final` at the last step."""

    warmup: int = 0
    final: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + float(np.cos(np.pi * done)))


class NonFiniteError(UserError):
    """A loss or gradient is nan or inf: the run stops and says where."""

    def __init__(self, role: str, tensor: str, step: int) -> None:
        super().__init__(
            f"{role}: {tensor}",
            f"must be finite, at step {step}",
            "nan or inf",
            "Lower trainer.optimizer's lr for this role, or set trainer.clip; nothing was zeroed, nothing saved.",
        )


@dataclass
class Progress:
    """What the loop reports. log: (step, figures) -> None.  save, evaluate: (step) -> None, outside the clock."""

    log: Callable[[int, Mapping[str, float]], None]
    save: Callable[[int], None]
    evaluate: Callable[[int], None]


@dataclass
class Outcome:
    """seconds: of training alone.  peak_bytes: of live tensors in one full step."""

    seconds: float = 0.0
    peak_bytes: int = 0
    snapshots: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Trainer:
    """steps: optimizer steps of the method's clock.  batch_size: samples per micro-batch and process.  accumulate:
    micro-batches per step.  optimizer, lr, clip: by role name, `default` for the others; clip is the largest gradient
    norm, null is none.  ema: role -> rate of its evaluation average.  log_every, checkpoint_every, evaluate_every:
    in steps, 0 is only at the end.
    """

    def __init__(
        self,
        steps: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        log_every: int,
        checkpoint_every: int,
        optimizer: Mapping[str, partial[torch.optim.Optimizer]],
        lr: Mapping[str, Schedule],
        clip: Mapping[str, float | None],
        ema: Mapping[str, Rate],
    ) -> None:
        for key, value, least in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 1),
            ("accumulate", accumulate, 1),
            ("log_every", log_every, 1),
            ("checkpoint_every", checkpoint_every, 0),
        ):
            if value < least:
                raise UserError(f"trainer.{key}", f"must be >= {least}", value, "Raise it.")
        self.steps, self.batch_size, self.accumulate, self.seed = steps, batch_size, accumulate, seed
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.optimizer, self.lr, self.clip, self.ema = optimizer, lr, clip, ema

    def fit(
        self,
        distiller: Distiller,
        networks: Networks,
        data: Data,
        needs: frozenset[str],
        accelerator: Accelerator,
        progress: Progress,
        evaluate_every: int = 0,
    ) -> Outcome:
        """Run all steps; the networks are left trained, their evaluation averages tracked."""
        optimizers = self.prepare(networks)
        outcome = Outcome()
        early = range(min(1, self.steps - 1), min(11, self.steps))  # after the first step optimizers hold their state
        measured = max(early, key=lambda step: len(distiller.phases(step)))
        for step in range(self.steps):
            started = time.perf_counter()
            batches = self.batches(data, needs, networks, step)
            counter = PeakBytes(self._live(networks, optimizers)) if step == measured else None
            figures: dict[str, float] = {}
            for phase in distiller.phases(step):
                run = partial(self.update, phase, batches, step, networks, optimizers, accelerator)
                if counter is None:
                    losses, norms = run()
                else:
                    with counter:
                        losses, norms = run()
                if (step + 1) % self.log_every == 0:
                    figures |= _figures(phase, losses) | {f"grad_norm/{role}": float(n) for role, n in norms.items()}
            self._transit(distiller.after_step(step), networks, optimizers, outcome)
            if counter is not None:
                outcome.peak_bytes = counter.peak
            seconds = time.perf_counter() - started
            outcome.seconds += seconds
            if (step + 1) % self.log_every == 0:
                rates = {f"lr/{role}": optimizer.param_groups[0]["lr"] for role, optimizer in optimizers.items()}
                progress.log(step + 1, {**figures, **rates, "time/step_seconds": seconds})
            if step + 1 < self.steps:
                if self.checkpoint_every and (step + 1) % self.checkpoint_every == 0:
                    progress.save(step + 1)
                if evaluate_every and (step + 1) % evaluate_every == 0:
                    progress.evaluate(step + 1)
        networks.train_only(())
        return outcome

    def prepare(self, networks: Networks) -> dict[str, torch.optim.Optimizer]:
        """One optimizer for each trainable role; evaluation averages begin."""
        self.check_roles(networks)
        for role, rate in self.ema.items():
            networks.track(role, rate)
        return {role: self._optimizer(role, networks) for role in networks.trainable}

    def batches(self, data: Data, needs: frozenset[str], networks: Networks, step: int) -> list[Batch]:
        """The micro-batches of a step on this process, shared by its phases."""
        total = self.batch_size * self.accumulate * _rank()[1]
        streams = (self.rng(step, "data", index, networks.device) for index in range(self.accumulate))
        return [data.batch(rng, total, needs, networks.dtype) for rng in streams]

    def update(
        self,
        phase: Phase,
        batches: Sequence[Batch],
        step: int,
        networks: Networks,
        optimizers: Mapping[str, torch.optim.Optimizer],
        accelerator: Accelerator,
    ) -> tuple[list[Loss], dict[str, Tensor]]:
        """One phase: phases outside, micro-batches inside, one optimizer step for each role it trains."""
        networks.train_only(phase.trains)
        losses = []
        for index, batch in enumerate(batches):
            rng = self.rng(step, phase.name, index, networks.device)
            torch.manual_seed(rng.torch_seed())  # dropout
            with accelerator.autocast():
                loss = phase.loss(batch, rng)
            total = loss.total
            if not torch.isfinite(total):
                bad = [name for name, term in loss.terms.items() if not torch.isfinite(term)]
                raise NonFiniteError(", ".join(phase.trains), f"loss {phase.name}/{bad[0] if bad else 'total'}", step)
            accelerator.backward(total / len(batches))
            losses.append(Loss({k: v.detach() for k, v in loss.terms.items()}, loss.stats))
        norms = {role: self.step(role, step, networks, optimizers[role]) for role in phase.trains}
        networks.update_ema(phase.trains)
        networks.zero_grad()
        return losses, norms

    def step(self, role: str, step: int, networks: Networks, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clip and step one role; returns the norm of its gradient. Raises NonFiniteError."""
        gradients = [p.grad for p in networks.weights(role) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            names = [n for n, p in networks.named_weights(role) if p.grad is not None and not p.grad.isfinite().all()]
            raise NonFiniteError(role, f"gradient of {names[0] if names else 'all weights'}", step)
        limit = self.clip.get(role, self.clip.get("default"))
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(networks.weights(role), limit, norm)
        factor = self._of(self.lr, role)(step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        return norm

    def rng(self, step: int, phase: str, micro_batch: int, device: torch.device | str) -> Rng:
        """The draws of one micro-batch on this process; ids as accelerate's loader deals batches."""
        rank, world = _rank()
        first = (micro_batch * world + rank) * self.batch_size
        return Rng(self.seed, step, phase, range(first, first + self.batch_size), device)

    def _optimizer(self, role: str, networks: Networks) -> torch.optim.Optimizer:
        try:
            optimizer = self._of(self.optimizer, role)(networks.weights(role))
        except (ValueError, RuntimeError) as error:  # torch's own checks of rates and flags
            key = f"trainer.optimizer.{role if role in self.optimizer else 'default'}"
            raise UserError(key, "must be what torch accepts", error, "Mend its values.") from error
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def _transit(
        self,
        transition: Transition | None,
        networks: Networks,
        optimizers: dict[str, torch.optim.Optimizer],
        outcome: Outcome,
    ) -> None:
        if transition is None:
            return
        for role, name in transition.snapshot:
            outcome.snapshots[name] = {key: value.clone() for key, value in networks.state(role).items()}
        for name, role in transition.restore:
            networks.load(role, outcome.snapshots[name])
        for source, target in transition.copy:
            networks.copy(source, target)
        for role in transition.restart:
            optimizers[role] = self._optimizer(role, networks)
            networks.restart_averages(role)

    def _of(self, values: Mapping[str, Any], role: str) -> Any:
        return values[role] if role in values else values["default"]

    def check_roles(self, networks: Networks) -> None:
        """Refuse settings for roles the method does not train, roles without settings, and what optimizers refuse."""
        for key in ("optimizer", "lr", "clip", "ema"):
            values = getattr(self, key)
            if unknown := sorted(set(values) - {"default", *networks.trainable}):
                raise UserError(
                    f"trainer.{key}.{unknown[0]}",
                    f"must be default or among {networks.trainable}",
                    "it",
                    "Mend the name.",
                )
        for key in ("optimizer", "lr"):
            if missing := [r for r in networks.trainable if not {r, "default"} & set(getattr(self, key))]:
                raise UserError(f"trainer.{key}", "must have a default or name every role", missing, "Add default.")
        for role in networks.trainable:
            self._optimizer(role, networks)

    @staticmethod
    def _live(networks: Networks, optimizers: Mapping[str, torch.optim.Optimizer]) -> list[Tensor]:
        weights = [*networks.teacher.parameters(), *networks.teacher.buffers()]
        owned = [p for role in networks.owned for p in networks.weights(role)]
        averages = [tensor for average in networks.averages().values() for tensor in average.average]
        return [*weights, *owned, *averages, *optimizer_tensors(optimizers.values())]


def _figures(phase: Phase, losses: Sequence[Loss]) -> dict[str, float]:
    """Terms and stats of a phase, mean over micro-batches."""
    merged = [{**loss.terms, **loss.stats} for loss in losses]
    return {f"{phase.name}/{key}": sum(float(m[key]) for m in merged) / len(merged) for key in merged[0]}


def _rank() -> tuple[int, int]:
    """(rank, world size) of this process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
