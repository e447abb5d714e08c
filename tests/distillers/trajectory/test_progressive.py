"""Progressive distillation: one step of its target lands where two of the teacher land; stages hand over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from diffdistill.config import build, compose
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.trajectory.progressive import Progressive, implied_x0, two_steps
from diffdistill.errors import UserError
from diffdistill.generator import Generator
from diffdistill.networks.exact import Gaussian, mixture_on_circle
from diffdistill.process import EDM, VP, NoiseProcess, RectifiedFlow, Trig
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.solvers import OdeSampler, ddim, karras
from diffdistill.trainer import Progress

PROCESSES: dict[str, tuple[NoiseProcess, tuple[float, float, float]]] = {
    "edm": (EDM(0.002, 80.0), (3.0, 1.1, 0.4)),
    "vp": (VP(), (600.0, 450.0, 300.0)),
    "rf": (RectifiedFlow(), (0.8, 0.6, 0.4)),
    "rf to the end": (RectifiedFlow(), (0.3, 0.1, 0.0)),
    "trig": (Trig(), (1.2, 0.9, 0.5)),
}


def draws(process: NoiseProcess, times: tuple[float, float, float]) -> tuple[torch.Tensor, ...]:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, m, s = (torch.full((6,), time, dtype=torch.float64) for time in times)
    return process.add_noise(torch.ones_like(x), x, t), t, m, s


@pytest.mark.parametrize("name", PROCESSES)
def test_one_step_of_the_target_lands_where_two_steps_of_the_teacher_land(name: str) -> None:
    process, times = PROCESSES[name]
    teacher = Denoiser(mixture_on_circle(process, 8, 1.0, 0.1))
    x_t, t, m, s = draws(process, times)
    cond = {"label": torch.full((6,), 8)}
    goal = two_steps(teacher, x_t, t, m, s, cond)
    landed = ddim(teacher, ddim(teacher, x_t, t, m, cond), m, s, cond)
    torch.testing.assert_close(process.jump(x_t, goal, t, s), landed, rtol=1e-10, atol=1e-12)
    assert (goal - teacher(x_t, t, cond)).abs().max() > 1e-3  # which one step of the teacher does not


@pytest.mark.parametrize("name", PROCESSES)
def test_a_constant_prediction_is_its_own_target(name: str) -> None:
    process, times = PROCESSES[name]
    x_t, t, _, s = draws(process, times)
    x0 = torch.full_like(x_t, 0.3)
    torch.testing.assert_close(implied_x0(process, x_t, process.jump(x_t, x0, t, s), t, s), x0)


def test_in_float32_the_target_of_a_fine_grid_keeps_its_digits() -> None:
    process = EDM(0.002, 80.0)
    t, m, s = (torch.full((4,), time, dtype=torch.float64) for time in karras(process, 1024)[400:403])
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * t[:, None]
    teacher = Denoiser(Gaussian(process, [[0.7, 0.1]], [[1.3, 0.5]], dtype="float64"))
    wide = two_steps(teacher, x, t, m, s, {})
    narrow = two_steps(teacher, x.float(), t.float(), m.float(), s.float(), {})
    assert (narrow - wide).abs().max() < 2e-3  # float32 states: their rounding counts alpha / (alpha_s - rho alpha_t)


BASE = ("data=gmm2d", "distiller=progressive", "experiment=none", "evaluation=none", "run_dir=none")


def recipe_of(*words: str) -> Recipe:
    return assemble(compose("train", [*BASE, *words]))  # type: ignore[arg-type]


def test_a_student_at_its_target_samples_as_the_teacher_with_twice_the_steps() -> None:
    recipe = recipe_of("distiller.num_steps=[4]", "distiller.shares=[1]")
    method: Any = recipe.distiller
    process, target = recipe.networks["student"].process, recipe.networks["target"]
    fine = karras(process, 8)

    class Perfect:
        """What a student at zero loss predicts."""

        def x0(self, x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
            index = min(range(0, 8, 2), key=lambda i: abs(fine[i] - float(t[0])))
            m, s = (torch.full_like(t, fine[index + k]) for k in (1, 2))
            return two_steps(target, x_t, t, m, s, {"label": cond["label"]})

        def __init__(self) -> None:
            self.process = process

    generator = method.generator
    perfect = Generator(Perfect(), generator.times, generator.renoise)  # type: ignore[arg-type]
    rng = Rng(0, 0, "x", range(32))
    z, cond = rng.normal((32, 2)), {"label": rng.integers(8, (32,))}
    ours = perfect.sample(z, cond, rng)
    theirs = OdeSampler(target, ddim, fine, karras).sample(z, cond, rng)
    # the generator ends with the x0 of its last call; the teacher's with the state at t_min
    s, t_min = fine[6], fine[8]
    torch.testing.assert_close(ours, theirs, atol=5 * t_min / s, rtol=0)


def test_stages_share_the_steps_and_hand_over() -> None:
    words = ["distiller.num_steps=[4,2,1]", "distiller.shares=[1,1,2]", "distiller.total_steps=8"]
    method = recipe_of(*words).distiller
    assert isinstance(method, Progressive) and len(method.generator.times) == 1
    seen, transitions = [], []
    for step in range(8):
        method.phases(step)
        seen.append(len(method.generator.times))
        transitions.append(method.after_step(step))
    assert seen == [4, 4, 2, 2, 1, 1, 1, 1]
    due = [step for step, transition in enumerate(transitions) if transition is not None]
    assert due == [1, 3]
    first = transitions[1]
    assert first is not None and first.copy == (("student", "target"),) and first.restart == ("student",)


def test_the_target_of_a_stage_is_the_student_before_it_and_guidance_stays_inside() -> None:
    words = ["distiller.num_steps=[2,1]", "distiller.shares=[1,1]", "distiller.total_steps=2", "guidance.scale=2"]
    recipe = recipe_of(*words)
    trainer = build(compose("train", [*BASE, *words, "trainer.steps=2", "trainer.ema={}"]).trainer)
    assert recipe.networks["target"].guidance is not None
    state = trainer.start(recipe.distiller, recipe.networks)
    before = recipe.networks.state("target")
    weights = {key: value.clone() for key, value in before.items()}
    quiet = Progress(lambda step, figures: None, lambda step: None, lambda step: None)
    trainer.fit(state, recipe.data, recipe.needs, Accelerator(), quiet)
    assert recipe.networks["target"].guidance is None
    assert any((recipe.networks.state("target")[key] != value).any() for key, value in weights.items())
    teacher = dict(recipe.networks.teacher.state_dict())
    assert all(torch.equal(weights[key], teacher[key]) for key in weights)


def test_grids_nest() -> None:
    process = EDM(0.002, 80.0)
    for steps in (1, 2, 4):
        for coarse, fine in zip(karras(process, steps), karras(process, 2 * steps)[::2], strict=True):
            assert coarse == pytest.approx(fine, rel=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distiller.num_steps=[8,3,1]"], "distiller.num_steps must halve from stage to stage"),
        (["distiller.num_steps=[]"], "distiller.num_steps must halve"),
        (["distiller.num_steps=[2,1]", "distiller.shares=[1]"], "distiller.shares must hold 2 numbers > 0"),
        (["distiller.num_steps=[2,1]", "distiller.shares=[1,0]"], "distiller.shares must hold 2 numbers > 0"),
        (["distiller.total_steps=2"], "distiller.shares must give every stage a step of the 2"),
    ],
)
def test_stages_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        recipe_of(*words)
    assert str(refusal.value).startswith(message)
