"""Every distiller config against closed-form teachers: a new YAML in configs/distiller enrols itself.

Each property has been seen red on a broken line; when you change one, break what it guards again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from optimum import gauss_recipe, joined, place

from diffdistill.config import build, compose
from diffdistill.distillers.base import Phase
from diffdistill.generator import Generator
from diffdistill.networks.call import Pass, recorded_passes
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.trainer import Progress, Trainer

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "distiller").glob("*.yaml"))
GOLDEN = Path(__file__).parent / "golden" / "passes.json"


@dataclass(frozen=True)
class Refinement:
    """How a method with a discretised target is refined, and how its residual falls when its steps halve.

    Its gradient at the true map is not zero but of the solver's order: the card's factor is least.
    """

    key: str
    coarse: int
    least: float
    others: tuple[str, ...] = ()

    def overrides(self, factor: int = 1) -> tuple[str, ...]:
        return (f"{self.key}={factor * self.coarse}", *self.others)


# A quadratic distance: the pseudo-Huber one saturates on the residuals of coarse grids.
# A Heun step is off by the third power of its length: 8 per halving, measured 8.5; Euler has 4.4.
GRID = "distiller.pairs.num_steps.num_steps"
# BOOT's boundary is exact where the prior holds no signal.
SILENT = (
    "networks.process={_target_: diffdistill.process.RectifiedFlow, t_min: 0.002, t_max: 1.0}",
    "~sampler.grid.rho",
    "sampler.grid._target_=diffdistill.solvers.uniform",
    "distiller.power=1",  # at 2 it is the gradient over kappa that falls
)
DISCRETISED = {
    "consistency": Refinement(GRID, 10, 6.0, ("distiller.distance.c=1e3",)),
    "lcm": Refinement(GRID, 20, 3.5, ("distiller.distance.c=1e3",)),
    "boot": Refinement(GRID, 20, 1.8, SILENT),
    "kd": Refinement("sampler.num_steps", 10, 3.5),
}
# Methods whose optimum is no map of the Gaussian; their own tests say what it is.
BY_CONSTRUCTION = {
    "progressive",  # where two steps of its own teacher land
    "ladd",  # a game without a map of its own
    "dmd2_consistency",  # one-step generator and flow map at once, which differ by the prior's lack of signal
}


def modes(name: str) -> Iterator[tuple[str, str]]:
    part = build(compose("train", [f"distiller={name}", "run_dir=none"]).distiller)
    legal = [set(r.modes) for r in part.func.roles(**part.keywords).values() if r.trainable and r.build == "denoiser"]
    yield from ((name, mode) for mode in ("copy", "lora", "adapter") if all(mode in m for m in legal))


CASES = [case for name in NAMES for case in modes(name)]
on_copies = pytest.mark.parametrize("name", NAMES, ids=[f"{n}-copy" for n in NAMES])
on_maps = pytest.mark.parametrize("name", [n for n in NAMES if n not in BY_CONSTRUCTION])
in_every_mode = pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{n}-{m}" for n, m in CASES])


def gmm2d_recipe(name: str, mode: str = "copy", *overrides: str) -> Recipe:
    words = ["data=gmm2d", f"distiller={name}", "experiment=none", "evaluation=none", "run_dir=none", *overrides]
    settings = compose("train", words)
    part = build(settings.distiller)
    trained = [n for n, r in part.func.roles(**part.keywords).items() if r.trainable and r.build == "denoiser"]
    recipe = assemble(compose("train", [*words, *(f"roles.{role}={mode}" for role in trained)]))  # type: ignore[arg-type]
    return joined(recipe, 64)


def gan(name: str) -> list[str]:
    """The overrides that switch a method's GAN on, if it has one."""
    keys = compose("train", [f"distiller={name}", "experiment=none", "run_dir=none"]).distiller
    return ["distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1"] if "gan_weight" in keys else []


def trainer_of(*overrides: str) -> Trainer:
    return build(compose("train", ["experiment=none", "run_dir=none", *overrides]).trainer)


def loss_of(recipe: Recipe, phase: Phase, step: int, batch_size: int) -> torch.Tensor:
    """One draw of a phase's loss, a student phase first where samples are shared."""

    def draw(stream: str) -> Rng:
        return Rng(3, step, stream, range(batch_size))

    batch = recipe.data.batch(draw("data"), batch_size, recipe.needs, recipe.networks.dtype)
    recipe.networks.train_only(phase.trains)
    return phase.loss(batch, draw(phase.name)).total


def gradients(
    recipe: Recipe, phase: Phase, repeats: int = 40, batch_size: int = 1024
) -> dict[str, tuple[float, float]]:
    """role.parameter -> mean gradient and its standard error over independent batches."""
    draws: dict[str, list[float]] = {}
    for index in range(repeats):
        loss_of(recipe, phase, index, batch_size).backward()
        for role in phase.trains:
            for key, weight in recipe.networks.named_weights(role):
                draws.setdefault(f"{role}.{key}", []).append(0.0 if weight.grad is None else float(weight.grad.sum()))
        recipe.networks.zero_grad()
    values = {key: torch.tensor(found, dtype=torch.float64) for key, found in draws.items()}
    return {key: (float(v.mean()), float(v.std() / len(v) ** 0.5)) for key, v in values.items()}


@in_every_mode
def test_gradient_reaches_exactly_the_trained_roles(name: str, mode: str) -> None:
    recipe = gmm2d_recipe(name, mode, *gan(name))
    for phase in recipe.distiller.phases(0):
        # at the start both critics are the teacher, and the second factor of LoRA is 0: gradients would be 0 too
        for role in recipe.networks.owned:
            with torch.no_grad():
                for weight in recipe.networks.weights(role):
                    weight.add_(0.01 * torch.randn_like(weight))
        loss_of(recipe, phase, 0, 8).backward()
        for role in recipe.networks.owned:
            found = [w.grad is not None and bool((w.grad != 0).any()) for w in recipe.networks.weights(role)]
            assert any(found) == (role in phase.trains), (phase.name, role)
        assert all(w.grad is None for w in recipe.networks.teacher.parameters() if not w.requires_grad)
        recipe.networks.zero_grad()


@on_maps
def test_gradient_is_zero_at_the_optimum(name: str) -> None:
    if name in DISCRETISED:
        pytest.skip("its target is discretised: see how its residual falls")
    recipe = gauss_recipe(name)
    place(recipe)
    for phase in recipe.distiller.phases(0):
        for key, (mean, error) in gradients(recipe, phase).items():
            assert abs(mean) <= 4 * error + 1e-9, (phase.name, key, mean, error)


@pytest.mark.parametrize("name", DISCRETISED)
def test_the_residual_at_the_optimum_falls_as_steps_halve(name: str) -> None:
    refinement, found = DISCRETISED[name], []
    for factor in (1, 2, 4):
        recipe = gauss_recipe(name, *refinement.overrides(factor))
        place(recipe)
        phase = next(phase for phase in recipe.distiller.phases(0) if "student" in phase.trains)
        found.append(gradients(recipe, phase, repeats=20))
    for coarse, fine in itertools.pairwise(found):
        for key, (mean, error) in coarse.items():
            if abs(mean) > 8 * error:  # a coordinate with mean near 0 has no residual there
                assert abs(mean) >= refinement.least * (abs(fine[key][0]) - 4 * fine[key][1]), (key, mean, fine[key])
    assert any(abs(mean) > 8 * error for mean, error in found[0].values())


# the gradient is nearly odd about the optimum: of two opposite deviations one is among the slow tests
OPPOSITES = [pytest.param(*away, marks=pytest.mark.slow) for away in ((-0.3, 1.0), (0.0, 0.8))]


@on_maps
@pytest.mark.parametrize(("mean_off", "std_factor"), [(0.3, 1.0), (0.0, 1.2), *OPPOSITES])
def test_descent_moves_a_wrong_student_back(name: str, mean_off: float, std_factor: float) -> None:
    """Away from the optimum, in the mean and in the scale, the student's gradient has the sign of the deviation."""
    recipe = gauss_recipe(name)
    place(recipe, mean_off, std_factor)
    phase = next(phase for phase in recipe.distiller.phases(0) if "student" in phase.trains)
    found = gradients(recipe, phase)
    key, deviation = ("student.mean", mean_off) if mean_off else ("student.std", std_factor - 1)
    mean, error = found[key]
    assert mean * deviation > 0 and abs(mean) > 6 * error, (mean, error)


def rolls_out(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the student's phase runs its own sampler."""
    calls = []
    original = Generator.rollout

    def spy(self: Generator, *args: Any) -> Any:
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(Generator, "rollout", spy)
    loss_of(recipe, next(phase for phase in recipe.distiller.phases(0) if "student" in phase.trains), 0, 8)
    recipe.networks.zero_grad()
    return bool(calls)


@on_copies
def test_training_inputs_have_the_law_of_inference_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's calls with gradient see, step for step, what its own sampler feeds it."""
    keys = compose("train", [f"distiller={name}", "experiment=none", "run_dir=none"]).distiller
    few = ["distiller.times=[20.0,2.0]"] if "times" in keys and name != "kd" else []  # a pair has one step
    recipe = gauss_recipe(name, *few)
    if "parts" in keys:
        pytest.skip("each part is tested alone")
    if not rolls_out(recipe, monkeypatch):
        pytest.skip("trains on noised data at all times, not on what its sampler feeds it")
    place(recipe, 0.2, 1.1)
    seen: dict[str, dict[float, list[torch.Tensor]]] = {"training": {}, "inference": {}}
    current = ["training"]

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad or current[0] == "inference":
            for time in inputs[1].unique():  # one for all, or a step of its own for each sample
                here = inputs[0][inputs[1] == time].detach()
                seen[current[0]].setdefault(round(float(time), 4), []).append(here)

    student = recipe.networks["student"].network
    handle = student.register_forward_hook(hook)
    phase = next(phase for phase in recipe.distiller.phases(0) if "student" in phase.trains)
    for step in range(24):
        loss_of(recipe, phase, step, 2048)
    current[0] = "inference"
    for step in range(12):
        rng = Rng(11, step, "inference", range(2048))
        recipe.distiller.generator.sample(rng.normal((2048, *recipe.data.shape), torch.float64), {}, rng)
    handle.remove()
    assert seen["training"].keys() == seen["inference"].keys()
    for time, batches in seen["training"].items():
        ours, theirs = torch.cat(batches), torch.cat(seen["inference"][time])
        count = min(len(ours), len(theirs))
        assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() * (2 / count) ** 0.5, time
        assert abs(ours.std() / theirs.std() - 1) < 5 * count**-0.5, time


@on_maps
def test_a_short_run_lowers_the_distance(name: str) -> None:
    recipe = gauss_recipe(name, *(DISCRETISED[name].overrides() if name in DISCRETISED else ()))
    law = place(recipe, 0.5, 1.3)
    student = recipe.networks["student"].network

    def distance() -> float:
        return float(((student.mean - law["mean"]).abs() + (student.std - law["std"]).abs()).sum())

    before = distance()
    rates = [
        "trainer.optimizer.default.lr=0.01",
        "trainer.optimizer.default.weight_decay=0",
        "trainer.clip.default=null",
    ]
    trainer = trainer_of("trainer.steps=175", "trainer.batch_size=256", "trainer.ema={}", *rates)
    quiet = Progress(lambda step, figures: None, lambda step: None, lambda step: None)
    state = trainer.start(recipe.distiller, recipe.networks)
    trainer.fit(state, recipe.data, recipe.needs, Accelerator(), quiet)
    assert distance() < 0.5 * before


def passes_of(name: str) -> dict[str, list[str]]:
    """Network calls of the first six steps, phase by phase: role, batch, direction."""
    recipe = gmm2d_recipe(name, "copy", *gan(name))
    trainer = trainer_of("trainer.batch_size=4")
    optimizers, found = trainer.prepare(recipe.networks), {}
    for step in range(6):
        batches = trainer.batches(recipe.data, recipe.needs, recipe.networks, step)
        for phase in recipe.distiller.phases(step):
            with recorded_passes() as noted:
                trainer.update(phase, batches, step, recipe.networks, optimizers, Accelerator())
            found[f"{step} {phase.name}"] = [_line(done) for done in noted]
    return found


def _line(done: Pass) -> str:
    words = [done.role, "features" if done.layers is not None else "forward", *["jvp"] * done.jvp]
    words += ["backward"] * done.backward
    return " ".join([*words, *["through input"] * done.through_input])


@pytest.mark.parametrize("name", NAMES)
def test_network_calls_per_step_are_the_recorded_ones(name: str) -> None:
    """After a wanted change: python tests/test_distillers.py writes the file anew."""
    golden = json.loads(GOLDEN.read_text())
    assert passes_of(name) == golden.get(name)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({name: passes_of(name) for name in NAMES}, indent=1) + "\n")
