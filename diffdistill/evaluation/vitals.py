"""The vital signs of a run: what is measured beside training, every so many steps, on a seed of its own.

Nothing of the run is touched: its draws are keyed by seed and step, gradients are taken without being stored, and
dropout, the method's own state and torch's generators are put back. `health` judges what is found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.compiling import uncompiled
from diffdistill.denoiser import Cond, Denoiser, unconditioned
from diffdistill.errors import require_at_least
from diffdistill.evaluation.dissection import (
    AHEAD,
    STUDENT,
    Looked,
    lag,
    levels,
    look,
    phases_of,
    repeated,
    term_norms,
    untouched,
)
from diffdistill.evaluation.yardstick import FITS, Yardstick, data_and_conditions, heeded, yardstick
from diffdistill.networks.call import Seen, seen_calls
from diffdistill.networks.ema import Ema
from diffdistill.networks.roles import Networks
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng
from diffdistill.shards import whole
from diffdistill.training_state import TrainingState

COORDINATES = 4096  # of each tensor of weights that are followed through a step
CALLS = 512  # of the student, for samples
AT_ONCE = 2**16  # values of samples
PURE = math.log(100)  # log of the ratio of noise to data beyond which only one of them is seen
LEAST, MOST = 16, 256


@dataclass(frozen=True)
class Health:
    """every: steps between measurements.  num_samples: of the student; null: as many as values and steps of the
    sampler allow, 16 to 256.  seed: of all draws.
    """

    every: int = 200
    num_samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, every=self.every)
        require_at_least(8, num_samples=8 if self.num_samples is None else self.num_samples)
        require_at_least(0, seed=self.seed)

    def num(self, recipe: Recipe) -> int:
        values = math.prod(recipe.data.shape)
        most = min(MOST, AT_ONCE // values, CALLS // recipe.distiller.generator.nfe)
        return self.num_samples or max(LEAST, most)


class Vitals:
    """Measures one run. batch_size: of its micro-batches.  around: entered around a loss, as in training."""

    def __init__(
        self, health: Health, recipe: Recipe, batch_size: int, around: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.health, self.recipe, self.batch_size, self.around = health, recipe, batch_size, around
        self._before: dict[str, list[Tensor]] = {}
        self._ruler: Yardstick | None = None
        self._teacher_fits = False
        self._fixed: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is measured."""
        return step % self.health.every == 0

    def before(self, state: TrainingState) -> None:
        """Take notice of the weights before a step that is followed: in the run-up to each measurement the first one
        that trains most."""
        every, networks = self.health.every, state.networks
        window = min(AHEAD, every)
        first = (state.step // every + 1) * every - window
        if state.step < first:
            return
        step, phases = phases_of(state.distiller, first, window)
        if state.step == step:
            trained = dict.fromkeys(role for phase in phases for role in phase.trains)
            self._before = {role: [part.clone() for part in _parts(networks, role)] for role in trained}

    @uncompiled()
    def after(self, state: TrainingState) -> dict[str, float]:
        """The figures after a step; `state.step` counts it."""
        started = time.perf_counter()
        networks, distiller = state.networks, state.distiller
        figures = self._updates(networks)
        if not self.due(state.step):
            return {f"health/{key}": value for key, value in figures.items()}
        figures |= _averages(networks)
        with untouched(distiller, networks, state.step - 1):
            networks.train_only(())
            self._begin()
            figures |= self._fixed
            asked = self._samples(figures)
            self._phases(state, figures, asked)
        found = {f"health/{key}": value for key, value in figures.items() if math.isfinite(value)}
        return {**found, "time/health_seconds": time.perf_counter() - started}

    def _begin(self) -> None:
        """What does not change with the student: samples of the right law, and what the teacher says of the data."""
        if self._ruler is not None:
            return
        recipe, health = self.recipe, self.health
        self._ruler = yardstick(recipe, health.num(recipe), health.seed)
        rng = Rng(health.seed, 0, "health", range(1), recipe.networks.device)
        x0, cond = data_and_conditions(recipe.data, rng, recipe.networks.dtype)
        teacher = recipe.networks["teacher"].guided(None)
        fits = True
        if x0 is not None and cond:
            num = min(len(x0), 256)
            own = {key: value[:num].to(x0.device) for key, value in cond.items()}
            fits = self._heeded("data", teacher, x0[:num], own, float(x0.std()))
        if fits and self._ruler.of_teacher:
            right = torch.cat(list(self._ruler.right)).to(recipe.networks.dtype)
            fits = self._heeded("teacher", teacher, right, self._ruler.cond, self._ruler.std)
        self._teacher_fits = fits

    def _heeded(self, name: str, denoiser: Denoiser, x0: Tensor, cond: Cond, std: float) -> bool:
        """Note the slope of a denoiser on samples; whether it denoises them at all."""
        found = self._slope(denoiser, x0, cond, std)
        # of a network that has not been trained, and of samples of another law, nothing follows for conditions
        if min(found.get("left", 0.0), found.get("left_other", math.inf)) > FITS:
            return False
        if "slope" in found:
            self._fixed |= {f"condition/{name}": found["slope"], f"condition/{name}_doubt": found["doubt"]}
        return True

    def _slope(self, denoiser: Denoiser, x0: Tensor, cond: Cond, std: float) -> dict[str, float]:
        """How far samples belong to their conditions, against none, or another sample's where that is not known."""
        null = self.recipe.networks.teacher.null
        if null is None:
            other: Cond = {key: value.roll(max(1, len(x0) // 2), 0) for key, value in cond.items()}
        else:
            other = unconditioned(cond, null, x0)
        rng = Rng(self.health.seed, 0, "health condition", range(len(x0)), x0.device)
        return heeded(denoiser, x0, cond, other, std, rng)

    def _samples(self, figures: dict[str, float]) -> Tensor:
        """Figures of the student's samples; the noise levels its sampler asks it at."""
        ruler, recipe = self._ruler, self.recipe
        assert ruler is not None
        with seen_calls() as calls:
            samples = ruler.samples(recipe.distiller.generator)
        figures |= {f"sample/{key}": value for key, value in ruler.figures(samples).items()}
        if figures["sample/nonfinite"] == 0 and self._teacher_fits and ruler.cond:
            found = self._slope(recipe.networks["teacher"].guided(None), samples, ruler.cond, ruler.std)
            if "slope" in found:
                figures |= {"condition/student": found["slope"], "condition/student_doubt": found["doubt"]}
        return levels([call for call in calls if call.role == STUDENT])

    def _phases(self, state: TrainingState, figures: dict[str, float], asked: Tensor) -> None:
        networks, data, ruler = state.networks, self.recipe.data, self._ruler
        assert ruler is not None
        step, phases = phases_of(state.distiller, state.step - 1, AHEAD)
        looked = []
        for phase in phases:
            rng = Rng(self.health.seed, step, phase.name, range(self.batch_size), networks.device)
            total = self.batch_size
            batch = data.batch(rng.fork("data"), total, self.recipe.needs, networks.dtype)
            if STUDENT not in phase.trains:
                each = 8 if self.batch_size >= 16 else 4 if self.batch_size >= 8 else self.batch_size
                batch = repeated(batch, each)
            seen = look(phase, batch, rng, networks, self.around)
            for role in phase.trains:
                norms = term_norms(seen, networks, role)
                figures |= {f"term/{role}/{name}": norm for name, norm in norms.items()}
            if STUDENT not in phase.trains and seen.of(STUDENT, False):
                for role in phase.trains:
                    if (
                        isinstance(networks[role], Denoiser)
                        and (late := lag(seen, role, tuple(batch.cond))) is not None
                    ):
                        figures[f"lag/{role}"] = late
            looked.append(seen)
        figures |= _ranges(looked, asked, ruler.std)

    def _updates(self, networks: Networks) -> dict[str, float]:
        """Relative size of the step of each role that was noticed before it."""
        found = {}
        for role, before in self._before.items():
            after = _parts(networks, role)
            moved = math.sqrt(sum(float((a - b).float().square().sum()) for a, b in zip(after, before, strict=True)))
            size = math.sqrt(sum(float(b.float().square().sum()) for b in _beside(networks, role, before)))
            found[f"update/{role}"] = moved / size if size else 0.0
        self._before = {}
        return found


def _parts(networks: Networks, role: str) -> list[Tensor]:
    """Some coordinates of each tensor of a role's weights, evenly spread."""
    return [_some(weight) for weight in networks.weights(role)]


def _some(weight: Tensor) -> Tensor:
    values = whole(weight).flatten()
    return values[:: max(1, values.numel() // COORDINATES)]


def _beside(networks: Networks, role: str, own: list[Tensor]) -> list[Tensor]:
    """The weights that a role's step is small or large beside: its own, or all those it adapts."""
    if networks.modes.get(role) not in ("lora", "adapter"):
        return own
    frozen = networks[role].network.parameters()
    return [*own, *(_some(weight) for weight in frozen)]


def _averages(networks: Networks) -> dict[str, float]:
    found = {}
    for role, average in networks.averages().items():
        apart = math.sqrt(
            sum(
                float((whole(a) - whole(w)).float().square().sum())
                for a, w in zip(average.average, average.source, strict=True)
            )
        )
        size = math.sqrt(sum(float(whole(w).float().square().sum()) for w in average.source))
        found[f"average/{role}"] = apart / size if size else 0.0
        found[f"average/{role}_first"] = _first_share(average)
    return found


def _first_share(average: Ema) -> float:
    """The share of the average that is still the weights it began from."""
    share = 1.0
    for update in range(1, average.updates + 1):
        share *= average.rate(update)
        if share < 1e-6:
            return 0.0
    return share


def _within(trained: Tensor, asked: Tensor) -> bool:
    """Whether a student is trained at none but the noise levels [n] that its sampler asks it at."""
    grid = asked.unique()
    return bool(len(grid)) and bool(((trained.unique()[:, None] - grid).abs().amin(1) < 1e-4).all())


def _ranges(looked: Sequence[Looked], asked: Tensor, std: float) -> dict[str, float]:
    """Where roles are asked against where they are trained, in logs of the noise-to-signal ratio."""
    found: dict[str, float] = {}
    scale = math.log(std)
    trained: dict[str, list[Seen]] = {}
    elsewhere: dict[str, list[Seen]] = {}
    for seen in looked:
        for call in seen.calls:
            mine = call.role in seen.phase.trains
            if mine and call.out.requires_grad:
                trained.setdefault(call.role, []).append(call)
            elif not mine:
                elsewhere.setdefault(call.role, []).append(call)
    for role, calls in trained.items():
        ends = levels(calls).aminmax()
        found[f"times/{role}_low"], found[f"times/{role}_high"] = (float(end) for end in ends)
        at = asked if role == STUDENT else levels(elsewhere.get(role, []))
        if role == STUDENT and _within(levels(calls), asked):
            at = levels(calls)  # by its own rollout: a batch has one step of it, the others have their turn
        if len(at):
            at, low, high = (x.clamp(-PURE, PURE) for x in (at - scale, ends[0] - scale, ends[1] - scale))
            beyond = torch.maximum(at - high, low - at).clamp(min=0)
            found[f"times/{role}_beyond"] = float(beyond.max())
            found[f"times/{role}_outside"] = float((beyond > 0).double().mean())
    frozen = [call for role in elsewhere if role not in trained for call in elsewhere[role] if role != STUDENT]
    if frozen:
        relative = levels(frozen) - scale
        found["times/telling"] = float(((relative > math.log(0.05)) & (relative < math.log(20))).double().mean())
    return found
