"""The training loop: executes the phases a method returns; knows no method by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffdistill import fused_step, ranks
from diffdistill.activity import during
from diffdistill.data import Data
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, Transition
from diffdistill.errors import UserError, require_at_least
from diffdistill.finite import DATA, culprit
from diffdistill.memory import PeakBytes, optimizer_tensors
from diffdistill.networks.ema import Rate
from diffdistill.networks.roles import Networks
from diffdistill.read_ahead import reading_ahead
from diffdistill.rng import Rng
from diffdistill.shards import norm, norm_in_float64, parts, whole
from diffdistill.training_state import TrainingState

Schedule = Callable[[int, int], float]  # (step, steps) -> factor on the learning rate


@dataclass(frozen=True)
class ConstantLR:
    """Full rate after `warmup` steps of linear rise."""

    warmup: int = 0

    def __post_init__(self) -> None:
        require_at_least(0, warmup=self.warmup)

    def __call__(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class CosineLR:
    """Linear rise over `warmup` steps, then half a cosine down to the share `final` at the last step."""

    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(0, warmup=self.warmup)
        if not 0 <= self.final <= 1:
            raise UserError("final", "must lie in [0, 1]", self.final, "It is a share of the full rate.")

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + float(np.cos(np.pi * done)))


class NonFiniteError(UserError):
    """A loss or gradient is nan or inf: the run stops and says where."""

    def __init__(self, role: str, tensor: str, step: int) -> None:
        todo = "Lower its lr in trainer.optimizer, or set trainer.clip"
        if role == DATA:
            todo = "Mend the data, or leave that sample out"
        fix = f"{todo}; nothing was zeroed, older checkpoints stand."
        super().__init__(f"{role}: {tensor}", f"must be finite, at step {step}", "nan or inf", fix)


def _never() -> bool:
    return False


def _nothing(step: int) -> None:
    pass


@dataclass
class Progress:
    """What the loop reports. log: (step, figures) -> None.  save, evaluate: (step) -> None, outside the clock; an
    evaluation is followed by a save.  stop: asked after every step; true ends the loop after a save.  before, after:
    a step, of its number in both, outside the clock.
    """

    log: Callable[[int, Mapping[str, float]], None]
    save: Callable[[int], None]
    evaluate: Callable[[int], None]
    stop: Callable[[], bool] = _never
    before: Callable[[int], None] = _nothing
    after: Callable[[int], None] = _nothing


class Trainer:
    """steps: optimizer steps of the method's clock.  batch_size: samples per micro-batch and process.  accumulate:
    micro-batches per step.  optimizer, lr, clip: by role name, `default` for the others; clip is the largest gradient
    norm, null is none.  ema: role -> rate of its evaluation average.  log_every, checkpoint_every: in steps, 0 is only
    at the end.  keep: newest checkpoints that stay, beside the best evaluated one.  cpu_seconds: training ends before
    the step that could pass this many, with those of what the teacher made; None is no limit.  read_ahead: steps whose
    batches are read, where they come from files, while an earlier one is trained on; 0 is none.
    """

    def __init__(
        self,
        steps: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        log_every: int,
        checkpoint_every: int,
        keep: int,
        optimizer: Mapping[str, partial[torch.optim.Optimizer]],
        lr: Mapping[str, Schedule],
        clip: Mapping[str, float | None],
        ema: Mapping[str, Rate],
        cpu_seconds: float | None = None,
        read_ahead: int = 2,
    ) -> None:
        for key, value, least in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 1),
            ("accumulate", accumulate, 1),
            ("log_every", log_every, 1),
            ("checkpoint_every", checkpoint_every, 0),
            ("keep", keep, 1),
            ("read_ahead", read_ahead, 0),
        ):
            if value < least:
                raise UserError(key, f"must be >= {least}", value, "Raise it.")
        for role, limit in clip.items():
            if limit is not None and not 0 < limit < float("inf"):
                raise UserError(f"clip.{role}", "must be > 0, or null for none", limit, "The paper uses 10.")
        if cpu_seconds is not None and not 0 < cpu_seconds < float("inf"):
            raise UserError("cpu_seconds", "must be > 0, or null for no limit", cpu_seconds, "Raise it.")
        self.cpu_seconds, self.read_ahead = cpu_seconds, read_ahead
        self.steps, self.batch_size, self.accumulate, self.seed = steps, batch_size, accumulate, seed
        self.log_every, self.checkpoint_every, self.keep = log_every, checkpoint_every, keep
        self.optimizer, self.lr, self.clip, self.ema = optimizer, lr, clip, ema

    def start(self, distiller: Distiller, networks: Networks) -> TrainingState:
        """The state before the first step; `TrainingState.load` moves it on to a checkpoint."""
        return TrainingState(distiller, networks, self.prepare(networks), self.global_batch)

    def fit(
        self,
        state: TrainingState,
        data: Data,
        needs: frozenset[str],
        accelerator: Accelerator,
        progress: Progress,
        evaluate_every: int = 0,
    ) -> None:
        """Run the steps that are left, or until asked to stop; `state` is where they led.

        evaluate_every: in steps, 0 is never.
        """
        measured = self.measured(state.distiller)
        with reading_ahead(data, self.read_ahead, self.steps - 1) as read:
            while not self.ended(state):
                progress.before(state.step + 1)
                figures = self.advance(state, read, needs, accelerator, measured=state.step == measured)
                ended = self.ended(state)
                if state.step % self.log_every == 0:
                    progress.log(state.step, figures)
                progress.after(state.step)
                evaluated = bool(evaluate_every) and state.step % evaluate_every == 0 and not ended
                if evaluated:
                    progress.evaluate(state.step)
                stopping = ranks.any_of(progress.stop())
                due = bool(self.checkpoint_every) and state.step % self.checkpoint_every == 0
                if ended or due or evaluated or stopping:
                    progress.save(state.step)
                if stopping:
                    break
        state.networks.train_only(())

    def advance(
        self, state: TrainingState, data: Data, needs: frozenset[str], accelerator: Accelerator, measured: bool = False
    ) -> dict[str, float]:
        """One step, timed; its figures if it is one to log. measured: its peak of live bytes is taken."""
        started, cpu_started = time.perf_counter(), time.process_time()
        counter = PeakBytes(self._live(state)) if measured else nullcontext()
        figures = self._run(state, data, needs, accelerator, counter)
        if isinstance(counter, PeakBytes):
            state.peak_bytes = counter.peak
        seconds = time.perf_counter() - started
        state.seconds += seconds
        (cpu_seconds,) = ranks.highest(time.process_time() - cpu_started)
        state.cpu_seconds += cpu_seconds
        state.dearest = max(state.dearest, cpu_seconds)
        state.step += 1
        return {**figures, "time/step_seconds": seconds}

    def ended(self, state: TrainingState) -> bool:
        """Whether no step is left: all are done, or one as dear as the dearest so far may pass `cpu_seconds`."""
        limit = float("inf") if self.cpu_seconds is None else self.cpu_seconds
        return state.step >= self.steps or (state.step > 0 and state.next_cpu_seconds > limit)

    def _run(
        self,
        state: TrainingState,
        data: Data,
        needs: frozenset[str],
        accelerator: Accelerator,
        counter: AbstractContextManager[Any],
    ) -> dict[str, float]:
        """One step; figures if it is one to log, each phase's of its last time since the line before, as some have
        their turn at other steps. counter: entered around the phases.
        """
        step, networks = state.step, state.networks
        started = time.perf_counter()
        with during("data"):
            batches = ranks.together(lambda: self.batches(data, needs, networks, step))
        waited = time.perf_counter() - started
        for phase in state.distiller.phases(step):
            with during(f"phase {phase.name}"), counter:
                losses, norms = self.update(phase, batches, step, networks, state.optimizers, accelerator)
            state.latest[phase.name] = (losses, norms)
        figures: dict[str, float] = {}
        logged = (step + 1) % self.log_every == 0
        if logged:
            for name, (losses, norms) in state.latest.items():
                figures |= ranks.mean(_figures(name, losses))
                figures |= {f"grad_norm/{role}": float(n) for role, n in norms.items()}
            state.latest.clear()
        self._transit(state.distiller.after_step(step), state)
        if logged:
            figures |= {f"lr/{role}": o.param_groups[0]["lr"] for role, o in state.optimizers.items()}
            figures["time/data_seconds"] = waited
        return figures

    def measured(self, distiller: Distiller) -> int:
        """The step whose peak of live bytes is taken: after the first step optimizers hold their state."""
        early = range(min(1, self.steps - 1), min(11, self.steps))
        return max(early, key=lambda step: len(distiller.phases(step)))

    def prepare(self, networks: Networks) -> dict[str, torch.optim.Optimizer]:
        """One optimizer for each trainable role; evaluation averages begin."""
        self.check_roles(networks)
        for role, rate in self.ema.items():
            networks.track(role, rate)
        return {role: self._optimizer(role, networks) for role in networks.trainable}

    @property
    def global_batch(self) -> int:
        """Samples of one step over all processes: runs with the same number draw the same ones."""
        return self.batch_size * self.accumulate * ranks.place()[1]

    def batches(self, data: Data, needs: frozenset[str], networks: Networks, step: int) -> list[Batch]:
        """The micro-batches of a step on this process, shared by its phases."""
        total = self.global_batch
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
            networks.sync_gradients(index == len(batches) - 1)
            rng = self.rng(step, phase.name, index, networks.device)
            rng.seed_torch()  # dropout
            with accelerator.autocast():
                loss = phase.loss(batch, rng)
            accelerator.backward(loss.total if len(batches) == 1 else loss.total / len(batches))
            losses.append(Loss(_detached(loss.terms), _detached(loss.stats)))
        networks.settle(phase.trains)
        return losses, self.apply(phase, batches, losses, step, networks, optimizers)

    def apply(
        self,
        phase: Phase,
        batches: Sequence[Batch],
        losses: Sequence[Loss],
        step: int,
        networks: Networks,
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> dict[str, Tensor]:
        """Step the roles of a phase by their gradients, which are then none, and renew averages. Returns their norms.

        Whether all is finite is asked once, before anything is stepped: the one place where a phase waits for a device.
        """
        norms = {role: norm(_gradients(networks, role)) for role in phase.trains}
        known = _numbers(losses, norms)
        if not all(map(math.isfinite, known)):
            self._refuse(phase, batches, losses, step, networks, optimizers)
            norms = {role: _in_float64_if_too_large(total, _gradients(networks, role)) for role, total in norms.items()}
            known = _numbers(losses, norms)
        for (role, total), number in zip(norms.items(), known[len(losses) :], strict=True):
            self.step(role, step, networks, optimizers[role], total, number)
        networks.update_ema(phase.trains)
        networks.zero_grad()
        return norms

    def step(
        self, role: str, step: int, networks: Networks, optimizer: torch.optim.Optimizer, total: Tensor, number: float
    ) -> None:
        """Clip and step one role. total, number: the norm of its gradient on its device, and as a number here."""
        limit = self.clip.get(role, self.clip.get("default"))
        if limit is not None and number + 2e-6 > 0.999 * limit:  # else the factor would be 1
            torch._foreach_mul_(parts(_gradients(networks, role)), (limit / (total + 1e-6)).clamp(max=1.0))
        factor = self._of(self.lr, role)(step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        fused_step.step(optimizer)

    def _refuse(
        self,
        phase: Phase,
        batches: Sequence[Batch],
        losses: Sequence[Loss],
        step: int,
        networks: Networks,
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> None:
        """Raise NonFiniteError, whose name is what spoilt a loss or gradient first, unless only a norm overflowed."""
        for batch, loss in zip(batches, losses, strict=True):
            if (bad := _not_finite(loss)) is not None:
                found = ranks.all_say(culprit(batch, networks, optimizers))
                term = (", ".join(phase.trains), f"loss {phase.name}/{bad}")
                raise NonFiniteError(*next((one for one in found if one is not None), term), step)
        for role in phase.trains:
            if not torch.isfinite(norm_in_float64(_gradients(networks, role))):
                named = [(n, p.grad) for n, p in networks.named_weights(role) if p.grad is not None]
                names = [n for n, gradient in named if not whole(gradient).isfinite().all()]
                raise NonFiniteError(role, f"gradient of {names[0] if names else 'all weights'}", step)

    def rng(self, step: int, phase: str, micro_batch: int, device: torch.device | str) -> Rng:
        """The draws of one micro-batch on this process; ids as accelerate's loader deals batches."""
        rank, world = ranks.place()
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

    def _transit(self, transition: Transition | None, state: TrainingState) -> None:
        if transition is None:
            return
        networks = state.networks
        for role, name in transition.snapshot:
            state.snapshots[name] = {key: value.clone() for key, value in networks.state(role).items()}
        for name, role in transition.restore:
            networks.load(role, state.snapshots[name])
        for source, target in transition.copy:
            networks.copy(source, target)
        for role in transition.restart:
            state.optimizers[role] = self._optimizer(role, networks)
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
                    repr(values[unknown[0]]),
                    "Mend the name.",
                )
        for key in ("optimizer", "lr"):
            if missing := [r for r in networks.trainable if not {r, "default"} & set(getattr(self, key))]:
                raise UserError(f"trainer.{key}", "must have a default or name every role", missing, "Add default.")
        for role in networks.trainable:
            self._optimizer(role, networks)

    @staticmethod
    def _live(state: TrainingState) -> list[Tensor]:
        networks, optimizers = state.networks, state.optimizers
        weights = [*networks.teacher.parameters(), *networks.teacher.buffers()]
        owned = [p for role in networks.owned for p in networks.weights(role)]
        averages = [tensor for average in networks.averages().values() for tensor in average.average]
        return parts([*weights, *owned, *averages, *optimizer_tensors(optimizers.values())])


def _gradients(networks: Networks, role: str) -> list[Tensor]:
    return [weight.grad for weight in networks.weights(role) if weight.grad is not None]


def _numbers(losses: Sequence[Loss], norms: Mapping[str, Tensor]) -> list[float]:
    """Losses and norms, by one wait for the device. Where any process has one that is not finite, all have nan."""
    figures = [*(loss.total for loss in losses), *norms.values()]
    device = figures[0].device
    if device.type == "cpu":
        found = [float(figure) for figure in figures]
    else:
        found = torch.stack([figure.to(device, torch.float64) for figure in figures]).tolist()
    return [math.nan] * len(found) if ranks.any_of(not all(map(math.isfinite, found))) else found


def _in_float64_if_too_large(total: Tensor, gradients: list[Tensor]) -> Tensor:
    return total if torch.isfinite(total) else norm_in_float64(gradients)


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def _figures(phase: str, losses: Sequence[Loss]) -> dict[str, float]:
    """Terms and stats of a phase, mean over micro-batches."""
    merged = [{**loss.terms, **loss.stats} for loss in losses]
    return {f"{phase}/{key}": sum(float(m[key]) for m in merged) / len(merged) for key in merged[0]}


def _not_finite(loss: Loss) -> str | None:
    """The first term that is nan or inf on any process, `total` if only their sum is; None if all are finite."""
    if not ranks.any_of(not torch.isfinite(loss.total)):
        return None
    bad = ranks.highest(*(float(not torch.isfinite(value)) for value in loss.terms.values()))
    return next((name for name, flag in zip(loss.terms, bad, strict=True) if flag), "total")
