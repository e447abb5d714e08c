"""Guidance distillation: the target is the guided teacher, the student begins as the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffdistill.config import compose
from diffdistill.denoiser import Guidance
from diffdistill.distillers.guidance.guidance_distillation import GuidanceDistillation
from diffdistill.errors import UserError
from diffdistill.losses import truncated_snr
from diffdistill.networks.call import recorded_passes
from diffdistill.process import EDM, VP
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng


def recipe_of(*words: str) -> Recipe:
    base = ["data=gmm2d", "distiller=guidance_distillation", "experiment=none", "evaluation=none", "run_dir=none"]
    return assemble(compose("train", [*base, *words]))  # type: ignore[arg-type]


def batch_of(recipe: Recipe) -> Any:
    return recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float32)


def test_the_loss_by_hand() -> None:
    recipe = recipe_of("distiller.scales.low=1.5")
    method = recipe.distiller
    assert isinstance(method, GuidanceDistillation)
    batch = batch_of(recipe)
    got = method.student_loss(batch, Rng(1, 0, "s", range(64))).total
    rng = Rng(1, 0, "s", range(64)).fork("GuidanceDistillation")
    teacher, null = recipe.networks["target"], recipe.networks.teacher.null
    t = method.law(rng, teacher.process, torch.float32)
    x_t = batch.x0 + t[:, None] * rng.normal(batch.shape)
    w = 1.5 + 3.5 * rng.uniform((64,))
    conditional = teacher(x_t, t, batch.cond)
    unconditional = teacher(x_t, t, {"label": null["label"].expand(64)})
    goal = unconditional + w[:, None] * (conditional - unconditional)
    weight = torch.clamp(1 / t.square(), min=1)
    torch.testing.assert_close(got, (weight * (conditional - goal).square().mean(1)).mean(), rtol=1e-4, atol=1e-6)


def test_at_scale_one_the_student_is_done_at_once() -> None:
    recipe = recipe_of("distiller.scales.low=1", "distiller.scales.high=1", "distiller.scale=1")
    method: Any = recipe.distiller
    assert float(method.student_loss(batch_of(recipe), Rng(1, 0, "s", range(64))).total) < 1e-10


def test_a_sampler_calls_the_student_once_per_evaluation() -> None:
    recipe = recipe_of("distiller.scale=3", "guidance.scale=3", "distiller.num_steps=4", "sampler.num_steps=4")
    method: Any = recipe.distiller
    assert method.generator.nfe == 7 and recipe.sampler.nfe == 14
    rng = Rng(0, 0, "x", range(4))
    with recorded_passes() as passes:
        method.generator.sample(rng.normal((4, 2)), {"label": torch.zeros(4, dtype=torch.int64)}, rng)
    assert [done.role for done in passes] == ["student"] * 7


def test_a_student_at_the_target_samples_as_the_guided_teacher() -> None:
    recipe = recipe_of("distiller.scale=2", "guidance.scale=2")
    method: Any = recipe.distiller
    rng = Rng(0, 0, "x", range(16))
    z, cond = rng.normal((16, 2)), {"label": torch.arange(16) % 8}
    teacher = recipe.networks["target"].guided(Guidance(2.0, recipe.networks.teacher.null))
    ours = type(method.generator)(teacher, method.solver, method.generator.times, method.grid).sample(z, cond, rng)
    torch.testing.assert_close(ours, recipe.sampler.sample(z, cond, rng))


@pytest.mark.parametrize(("process", "t", "wanted"), [(EDM(), 0.5, 4.0), (EDM(), 2.0, 1.0), (VP(), 999.0, 1.0)])
def test_the_truncated_weight(process: Any, t: float, wanted: float) -> None:
    assert float(truncated_snr(torch.tensor([t], dtype=torch.float64), process)) == pytest.approx(wanted)


def test_the_scale_of_the_samples_lies_in_the_trained_range() -> None:
    with pytest.raises(UserError, match=r"distiller.scale must lie in the trained range \[1, 5\]"):
        recipe_of("distiller.scale=7")
