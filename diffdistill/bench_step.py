"""A training step of a recipe and each of its parts, to be timed side by side in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator

from diffdistill.bench_memory import bytes_of, least_bytes
from diffdistill.bench_passes import Made, Recorder, answered
from diffdistill.bench_plain import PlainLoop, why_not
from diffdistill.compiling import Compile
from diffdistill.config import build
from diffdistill.distillers.base import Loss, Phase
from diffdistill.memory import held, keep_freed
from diffdistill.recipe import Recipe, assemble
from diffdistill.stand_in import Made as WithMade
from diffdistill.trainer import Trainer

UPDATES, ARITHMETIC = "updates: norms, clip, optimizer, averages", "data, noise and loss arithmetic"
HORIZON = 40  # steps within which phases are looked at


def period(phases: Callable[[int], Sequence[Phase]], horizon: int = HORIZON) -> int:
    """The number of steps after which the phases repeat."""
    names = [tuple(phase.name for phase in phases(index)) for index in range(2 * horizon)]
    return next(p for p in range(1, horizon + 1) if names[: 2 * horizon - p] == names[p:])


class Clock:
    """Milliseconds: of the process on a CPU, of the wall on a GPU, after the work that it was given is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        if self.device.type != "cuda":
            return 1000 * time.process_time()
        torch.cuda.synchronize(self.device)
        return 1000 * time.perf_counter()


@dataclass
class Part:
    """One line of the list. count: in a cycle.  milliseconds: of one, by round; of these, backward: of its backward
    pass.  wasted: graphs that were built and through which no gradient came, in a cycle.
    """

    name: str
    count: int = 0
    wasted: int = 0
    milliseconds: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def of_cycle(self) -> float:
        """Milliseconds, median over rounds."""
        return self.count * statistics.median(self.milliseconds)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "count": self.count,
            "milliseconds": self.of_cycle,
            "backward_milliseconds": self.count * statistics.median(self.backward) if self.backward else 0.0,
            "graphs_without_gradient": self.wasted,
        }


@dataclass(frozen=True)
class Update:
    """What a phase came to before its roles were stepped. norms: of their gradients."""

    phase: Phase
    step: int
    losses: list[Loss]
    norms: dict[str, torch.Tensor]


class Bench:
    """The trainer's own steps on a recipe, over one cycle of its phases, and each of their parts alone.

    Learning rates are zero, so that every round does the same work on the same numbers; what a teacher would have made
    is zeros.
    """

    def __init__(self, settings: Mapping[str, Any], accelerator: Accelerator, compiled: Compile) -> None:
        self.accelerator, self.clock = accelerator, Clock(accelerator.device)
        recipe = assemble(settings, accelerator.device)
        self.recipe: Recipe = replace(recipe, data=WithMade(recipe.data))
        self.networks, self.distiller = recipe.networks, recipe.distiller
        self.trainer: Trainer = build(settings["trainer"])
        self.trainer.lr, self.trainer.log_every = {"default": _still}, 10**9
        self.state = self.trainer.start(self.distiller, self.networks)
        if compiled is not False:
            self.networks.compile(compiled)
        self.length = period(self.distiller.phases)
        self.cycle()  # optimizers take their state, kernels are chosen, compilers compile
        self.passes, self.updates = self._recorded()
        self.parts = self._parts()

    # -- what is timed ----------------------------------------------------------------------------------------

    def cycle(self, measured: bool = False) -> float:
        """Milliseconds of a cycle's steps, as training does them. measured: live bytes are counted, which is slow."""
        self.state.step = 0
        started = self.clock.now()
        for _ in range(self.length):
            self.trainer.advance(self.state, self.recipe.data, self.recipe.needs, self.accelerator, measured)
            self.peak = max(getattr(self, "peak", 0), self.state.peak_bytes)
        return self.clock.now() - started

    def plain_cycle(self, loop: PlainLoop) -> float:
        """Milliseconds of the same steps by the plain loop, with memory as the system's library treats it."""
        keep_freed(False)
        started = self.clock.now()
        for step in range(self.length):
            loop.step(step)
        found = self.clock.now() - started
        if self.accelerator.device.type == "cpu":
            keep_freed(True)
            self.cycle()  # it has given back what the next ones need
        return found

    def round(self) -> None:
        """Time every part, passes in the order of the steps: one after its like finds warm caches, as it does there.

        A pass adds its gradients to those of the passes before it in its phase, as it does there too.
        """
        phase = None
        for made in self.passes:
            if made.phase is not phase:
                self.networks.zero_grad()
            phase = made.phase
            self._time(made)
        self.networks.zero_grad()
        self.parts[UPDATES].milliseconds.append(self._updates())
        self.parts[ARITHMETIC].milliseconds.append(self._arithmetic())

    def _time(self, made: Made) -> None:
        part, clock = self.parts[made.name], self.clock
        self.networks.train_only(made.phase.trains)
        with self.accelerator.autocast():
            started = clock.now()
            outputs = made.forward()
            forward = clock.now()
        if made.reached:
            made.backward(outputs)
        ended = clock.now()
        part.milliseconds.append(ended - started)
        part.backward.append(ended - forward)

    def _updates(self) -> float:
        """What the trainer does with the gradients of a cycle: norms, clipping, optimizers and averages.

        Gradients are as long as those of the steps themselves, so that the same ones are clipped.
        """
        total = 0.0
        for made in self.updates:
            self.networks.train_only(made.phase.trains)
            for role, norm in made.norms.items():
                weights = self.networks.weights(role)
                each = float(norm) / math.sqrt(sum(weight.numel() for weight in weights))
                for weight in weights:
                    weight.grad = torch.full_like(weight, each)
            started = self.clock.now()
            self.trainer.apply(made.phase, (), made.losses, made.step, self.networks, self.state.optimizers)
            total += self.clock.now() - started
        return total

    def _arithmetic(self) -> float:
        """A cycle without its networks and updates: batches, draws, losses and the gradients up to the networks."""
        total = 0.0
        with answered(self.passes):
            for step in range(self.length):
                started = self.clock.now()
                batches = self._batches(step)
                total += self.clock.now() - started
                for phase in self.distiller.phases(step):
                    self.networks.train_only(phase.trains)
                    started = self.clock.now()
                    for index, batch in enumerate(batches):
                        rng = self.trainer.rng(step, phase.name, index, self.networks.device)
                        with self.accelerator.autocast():
                            loss = phase.loss(batch, rng).total
                        loss.backward()
                    total += self.clock.now() - started
        return total

    def least_bytes(self) -> int:
        """The fewest live bytes of the cycle's largest phase."""
        stays = self.trainer._live(self.state)
        found = [bytes_of(made, stays, self.networks, self.accelerator.autocast) for made in self.passes]
        return least_bytes(stays, self.passes, found, self.networks)

    # -- what there is ----------------------------------------------------------------------------------------

    def _batches(self, step: int) -> Any:
        return self.trainer.batches(self.recipe.data, self.recipe.needs, self.networks, step)

    def _recorded(self) -> tuple[list[Made], list[Update]]:
        recorder, updates, optimizers = Recorder(), list[Update](), self.state.optimizers
        for step in range(self.length):
            batches = self._batches(step)
            for phase in self.distiller.phases(step):
                with recorder.during(replace(phase)):  # one for each step, whose gradients begin anew
                    found = self.trainer.update(phase, batches, step, self.networks, optimizers, self.accelerator)
                updates.append(Update(phase, step, *found))
        return recorder.passes, updates

    def _parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for made in self.passes:
            part = parts.setdefault(made.name, Part(made.name))
            part.count += 1
            part.wasted += made.graph and not made.reached
        return {**parts, UPDATES: Part(UPDATES, 1), ARITHMETIC: Part(ARITHMETIC, 1)}


def plain_loop(bench: Bench, settings: Mapping[str, Any]) -> PlainLoop | str:
    """The plain loop of a recipe, warm, or why there is none."""
    if (why := why_not(bench.distiller, bench.trainer)) is not None:
        return why
    recipe = assemble(settings, bench.accelerator.device)
    loop = PlainLoop(replace(recipe, data=WithMade(recipe.data)), bench.trainer, bench.accelerator)
    bench.plain_cycle(loop)
    return loop


def measured(
    settings: Mapping[str, Any], plainly: Mapping[str, Any], accelerator: Accelerator, pairs: int, compiled: Compile
) -> dict[str, Any]:
    """Figures of one recipe from `pairs` rounds; in each the cycle is timed first, then its parts, then it again, then
    the plain loop, built of the settings `plainly`, where there is one.

    Times are milliseconds of a cycle, medians over rounds.
    """
    bench = Bench(settings, accelerator, compiled)
    plain = plain_loop(bench, plainly)
    first, again, wall, slow = [], [], [], []
    for _ in range(pairs):
        started = time.perf_counter()
        first.append(bench.cycle())
        wall.append(time.perf_counter() - started)
        bench.round()
        again.append(bench.cycle())
        if isinstance(plain, PlainLoop):
            slow.append(bench.plain_cycle(plain))
    bench.cycle(measured=True)
    least = bench.least_bytes()
    passes = sum(part.of_cycle for name, part in bench.parts.items() if name not in (UPDATES, ARITHMETIC))
    updates, arithmetic = bench.parts[UPDATES].of_cycle, bench.parts[ARITHMETIC].of_cycle
    whole, total = statistics.median([*first, *again]), passes + updates + arithmetic
    return {
        "batch_size": bench.trainer.batch_size,
        "accumulate": bench.trainer.accumulate,
        "steps_in_cycle": bench.length,
        "pairs": pairs,
        "parameters": sum(weight.numel() for weight in bench.networks.teacher.parameters()),
        "parts": [part.to_json() for part in bench.parts.values()],
        "passes_milliseconds": passes,
        "sum_milliseconds": total,
        "step_milliseconds": whole,
        "ratio": whole / total,
        "ratio_to_passes_and_updates": whole / (passes + updates),
        "ratio_to_passes": whole / passes,
        "plain": plain if isinstance(plain, str) else "as written in bench_plain.py",
        "plain_milliseconds": statistics.median(slow) if slow else None,
        "speed_up": statistics.median(p / b for p, b in zip(slow, again, strict=True)) if slow else None,
        "null_ratio": statistics.median(b / a for a, b in zip(first, again, strict=True)),
        "steps_per_second": bench.length / statistics.median(wall),
        "peak_bytes": bench.peak,
        "least_bytes": least,
        "ratio_of_bytes": bench.peak / least,
        "held": held(),
    }


def _still(step: int, steps: int) -> float:
    return 0.0
