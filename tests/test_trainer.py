"""The training loop on closed-form and small networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from optimum import gauss_recipe, place

from diffdistill.config import build, compose
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, Transition
from diffdistill.errors import UserError
from diffdistill.networks.roles import Role
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.shards import norm
from diffdistill.trainer import ConstantLR, CosineLR, NonFiniteError, Progress, Trainer
from diffdistill.training_state import TrainingState


def trainer_of(*overrides: str) -> Trainer:
    return build(compose("train", ["experiment=none", "run_dir=none", *overrides]).trainer)


def fit(trainer: Trainer, recipe: Recipe, every: int = 0) -> tuple[TrainingState, list[tuple[str, Any]]]:
    seen: list[tuple[str, Any]] = []
    progress = Progress(
        lambda step, figures: seen.append(("log", (step, dict(figures)))),
        lambda step: seen.append(("save", step)),
        lambda step: seen.append(("evaluate", step)),
    )
    state = trainer.start(recipe.distiller, recipe.networks)
    trainer.fit(state, recipe.data, recipe.needs, Accelerator(), progress, every)
    return state, seen


def student(recipe: Recipe) -> torch.Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in recipe.networks.weights("student")])


def trained(*overrides: str) -> torch.Tensor:
    recipe = gauss_recipe("dmd2", "distiller.student_every=2")
    place(recipe, 0.5, 1.2)
    fit(trainer_of("trainer.steps=6", "trainer.clip.default=null", *overrides), recipe)
    return student(recipe)


def test_accumulation_gives_the_update_of_the_whole_batch() -> None:
    whole = trained("trainer.batch_size=32", "trainer.accumulate=1")
    split = trained("trainer.batch_size=8", "trainer.accumulate=4")
    assert torch.allclose(whole, split, rtol=1e-9, atol=1e-12)


def test_the_seed_decides_everything() -> None:
    assert torch.equal(trained("trainer.seed=1"), trained("trainer.seed=1"))
    assert not torch.equal(trained("trainer.seed=1"), trained("trainer.seed=2"))


def test_each_role_has_its_own_rate_and_others_the_default() -> None:
    recipe = gauss_recipe("dmd2")
    trainer = trainer_of("+trainer.optimizer.student={_target_:torch.optim.SGD,_partial_:true,lr:0.5}")
    optimizers = trainer.prepare(recipe.networks)
    assert isinstance(optimizers["student"], torch.optim.SGD)
    assert optimizers["student"].param_groups[0]["lr"] == 0.5
    assert isinstance(optimizers["fake_score"], torch.optim.AdamW)


def test_clipping_bounds_the_update_and_is_per_role() -> None:
    recipe = gauss_recipe("dmd2")
    place(recipe, 3.0, 2.0)
    sgd = "{_target_:torch.optim.SGD,_partial_:true,lr:1.0}"
    trainer = trainer_of(
        f"+trainer.optimizer.student={sgd}", "+trainer.clip.student=0.001", "trainer.clip.default=null"
    )
    optimizers = trainer.prepare(recipe.networks)
    before = student(recipe)
    phase = recipe.distiller.phases(0)[0]
    batches = trainer.batches(recipe.data, recipe.needs, recipe.networks, 0)
    _, norms = trainer.update(phase, batches, 0, recipe.networks, optimizers, Accelerator())
    assert float(norms["student"]) > 0.01
    assert float((student(recipe) - before).norm()) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(
    ("limit", "size"), [(1.0, 0.3), (1.0, 0.9985), (1.0, 0.9999995), (1.0, 2.0), (1e-6, 9e-7), (1e-6, 1e-9)]
)
def test_gradients_are_clipped_as_torch_does_it(limit: float, size: float) -> None:
    recipe = gauss_recipe("dmd2")
    sgd = "{_target_:torch.optim.SGD,_partial_:true,lr:1.0}"
    trainer = trainer_of(f"+trainer.optimizer.student={sgd}", f"+trainer.clip.student={limit}")
    optimizer = trainer.prepare(recipe.networks)["student"]
    weights = recipe.networks.weights("student")
    for index, weight in enumerate(weights):
        weight.data.zero_()
        weight.grad = torch.full_like(weight, size * (index + 1) / 3)
    wanted = [weight.grad.clone() for weight in weights if weight.grad is not None]
    total = norm(wanted)
    trainer.step("student", 0, recipe.networks, optimizer, total, float(total))
    copies = [torch.nn.Parameter(torch.zeros_like(weight)) for weight in weights]
    for one, gradient in zip(copies, wanted, strict=True):
        one.grad = gradient
    torch.nn.utils.clip_grad_norm_(copies, limit)
    for one, weight in zip(copies, weights, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(weight, -one.grad, rtol=1e-6, atol=0)


def test_logging_saving_and_evaluating_come_when_due() -> None:
    recipe = gauss_recipe("dmd2")
    _, seen = fit(trainer_of("trainer.steps=7", "trainer.log_every=3", "trainer.checkpoint_every=2"), recipe, every=4)
    assert [step for what, (step, *_) in ((w, v if w == "log" else (v,)) for w, v in seen) if what == "log"] == [3, 6]
    assert [v for w, v in seen if w == "save"] == [2, 4, 6, 7]
    assert [v for w, v in seen if w == "evaluate"] == [4]
    figures = seen[-1][1][1] if seen[-1][0] == "log" else next(v[1] for w, v in reversed(seen) if w == "log")
    assert {"critic/denoising", "grad_norm/fake_score", "lr/student", "time/step_seconds"} <= figures.keys()


def test_a_phase_whose_turn_is_at_other_steps_is_logged_once_for_each_time() -> None:
    """The student of DMD2 is trained at steps 1, 6, 11: never at one that is logged."""
    recipe = gauss_recipe("dmd2", "distiller.student_every=5")
    _, seen = fit(trainer_of("trainer.steps=12", "trainer.log_every=2"), recipe)
    lines = {step: figures for what, (step, figures) in (one for one in seen if one[0] == "log")}
    with_student = [step for step, figures in lines.items() if "student/dmd" in figures]
    assert with_student == [step for step, figures in lines.items() if "grad_norm/student" in figures] == [2, 6, 12]
    assert all("critic/denoising" in figures for figures in lines.values())
    _, each = fit(
        trainer_of("trainer.steps=12", "trainer.log_every=1"), gauss_recipe("dmd2", "distiller.student_every=5")
    )
    alone = {step: figures for what, (step, figures) in (one for one in each if one[0] == "log")}
    assert lines[2]["student/dmd"] == alone[1]["student/dmd"]
    assert lines[6]["critic/denoising"] == alone[6]["critic/denoising"]


def test_training_ends_before_the_step_that_could_pass_its_cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))  # a step takes 2 s
    monkeypatch.setattr("diffdistill.trainer.time.process_time", lambda: next(clock))
    trainer = trainer_of("trainer.steps=50", "trainer.cpu_seconds=11", "trainer.checkpoint_every=2")
    state, seen = fit(trainer, gauss_recipe("dmd2"), every=5)
    assert (state.step, state.cpu_seconds) == (5, 10)
    assert [v for w, v in seen if w == "save"] == [2, 4, 5] and not [v for w, v in seen if w == "evaluate"]
    assert trainer.ended(state)
    state.made_cpu_seconds, state.step, state.cpu_seconds = 4.0, 2, 4.0
    assert not trainer.ended(state)
    state.made_cpu_seconds = 5.5
    assert trainer.ended(state)


def test_peak_bytes_are_measured_on_one_step() -> None:
    outcome, _ = fit(trainer_of("trainer.steps=12", "trainer.batch_size=64"), gauss_recipe("dmd2"))
    assert 64 * 6 * 8 < outcome.peak_bytes < 2**20


def test_peak_bytes_are_measured_in_the_shortest_run_too() -> None:
    outcome, _ = fit(trainer_of("trainer.steps=1", "trainer.batch_size=64"), gauss_recipe("dmd2"))
    assert outcome.peak_bytes > 64 * 6 * 8


def test_the_evaluation_average_follows_its_own_role_only() -> None:
    recipe = gauss_recipe("dmd2", "distiller.student_every=5")
    trainer = trainer_of("trainer.ema={student:{_target_:diffdistill.networks.ema.Constant,decay:0.5}}")
    optimizers = trainer.prepare(recipe.networks)
    for step in range(4):
        batches = trainer.batches(recipe.data, recipe.needs, recipe.networks, step)
        for phase in recipe.distiller.phases(step):
            trainer.update(phase, batches, step, recipe.networks, optimizers, Accelerator())
    assert recipe.networks.averages()["student"].updates == 1  # one student step among four


class Toy(Distiller):
    """A student pulled to `goal`, for what the loop does around a method."""

    def __init__(self, networks: Any, transitions: Mapping[int, Transition] | None = None, bad_step: int = -1) -> None:
        self.networks, self.transitions, self.bad_step = networks, transitions or {}, bad_step

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"student": Role(), "target": Role(trainable=False, writable=True)}

    def phases(self, step: int) -> Sequence[Phase]:
        def loss(batch: Batch, rng: Rng) -> Loss:
            rows = torch.zeros(1, dtype=torch.float64)
            value = sum((weight**2).sum() for weight in self.networks.weights("student")) + rows.sum()
            return Loss({"pull": value * (math.nan if step == self.bad_step else 1.0)})

        return [Phase("student", ("student",), loss)]

    @property
    def generator(self) -> Any:
        raise AssertionError("not sampled")

    def after_step(self, step: int) -> Transition | None:
        return self.transitions.get(step)


def toy(**keywords: Any) -> Recipe:
    recipe = gauss_recipe("dmd2")
    from diffdistill.networks.roles import Networks

    networks = Networks(recipe.networks.teacher, Toy.roles(), recipe.data.shape, {})
    return Recipe(recipe.data, networks, Toy(networks, **keywords), frozenset(), recipe.sampler)


def test_a_transition_promotes_the_student_and_restarts_its_optimizer_and_average() -> None:
    recipe = toy(transitions={2: Transition(copy=(("student", "target"),), restart=("student",))})
    trainer = trainer_of("trainer.steps=3")
    fit(trainer, recipe)
    for ours, theirs in zip(recipe.networks.weights("target"), recipe.networks.weights("student"), strict=True):
        assert torch.equal(ours, theirs)
    average = recipe.networks.averages()["student"]
    assert average.updates == 0
    assert torch.equal(average.average[0], recipe.networks.weights("student")[0])


def test_snapshot_and_restore_bring_a_role_back() -> None:
    early = toy(
        transitions={0: Transition(snapshot=(("student", "first"),)), 3: Transition(restore=(("first", "student"),))}
    )
    fit(trainer_of("trainer.steps=4"), early)
    once = toy()
    fit(trainer_of("trainer.steps=1"), once)
    assert torch.equal(student(early), student(once))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named() -> None:
    recipe = toy(bad_step=2)
    with pytest.raises(NonFiniteError, match=r"student: loss student/pull must be finite, at step 2"):
        fit(trainer_of("trainer.steps=5"), recipe)


def updated(recipe: Recipe, loss: Callable[[list[torch.Tensor]], Any]) -> torch.Tensor:
    """The norm of the gradient of a loss of the student's weights, by which it was stepped once."""
    trainer, networks = trainer_of("trainer.batch_size=4"), recipe.networks
    batch = recipe.data.batch(Rng(0, 0, "data", range(4)), 4, recipe.needs, networks.dtype)
    phase = Phase("student", ("student",), lambda batch, rng: Loss({"made": loss(networks.weights("student"))}))
    return trainer.update(phase, [batch], 0, networks, trainer.prepare(networks), Accelerator())[1]["student"]


def test_a_gradient_that_is_not_finite_names_its_tensor() -> None:
    recipe = gauss_recipe("dmd2")
    before = student(recipe)
    with pytest.raises(NonFiniteError, match="gradient of mean"):  # 0, with a slope of 0 / 0
        updated(recipe, lambda weights: (weights[0] * 0).sqrt().sum() + weights[1].sum())
    assert torch.equal(student(recipe), before)


def test_gradients_whose_squares_are_too_large_for_float32_are_clipped_as_any() -> None:
    settings = compose("train", ["experiment=gmm2d_kd", "run_dir=none"])
    recipe = assemble({str(key): settings[key] for key in settings})
    before = student(recipe)
    norm = updated(recipe, lambda weights: sum((1e25 * weight).sum() for weight in weights))
    assert float(norm) == pytest.approx(1e25 * len(before) ** 0.5, rel=1e-5)
    assert student(recipe).isfinite().all() and not torch.equal(student(recipe), before)


def test_settings_for_an_unknown_role_are_refused() -> None:
    recipe = gauss_recipe("dmd2")
    with pytest.raises(UserError, match=r"trainer\.clip\.critic"):
        trainer_of("+trainer.clip.critic=1.0").prepare(recipe.networks)


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("batch_size", 0), ("accumulate", 0), ("log_every", 0)])
def test_counts_below_one_are_refused(key: str, value: int) -> None:
    with pytest.raises(UserError, match=f"trainer.{key}"):
        trainer_of(f"trainer.{key}={value}")


def test_schedules_start_high_and_end_where_they_say() -> None:
    assert ConstantLR(warmup=3)(0, 10) == 0.25
    assert ConstantLR(warmup=3)(3, 10) == 1.0
    cosine = CosineLR(warmup=0, final=0.1)
    assert cosine(0, 100) == pytest.approx(1.0)
    assert cosine(50, 100) == pytest.approx(0.55)
    assert cosine(100, 100) == pytest.approx(0.1)
