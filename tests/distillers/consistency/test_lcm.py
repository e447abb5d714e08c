"""LCM: consistency distillation of the teacher guided by w, which both maps are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffdistill.config import compose
from diffdistill.denoiser import Guidance
from diffdistill.distillers.consistency.lcm import LCM
from diffdistill.errors import UserError
from diffdistill.networks.call import recorded_passes
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.solvers import ddim

BASE = ("data=gmm2d", "experiment=none", "evaluation=none", "run_dir=none")


def recipe_of(*words: str, name: str = "lcm") -> Recipe:
    return assemble(compose("train", [*BASE, f"distiller={name}", *words]))  # type: ignore[arg-type]


def batch_of(recipe: Recipe, size: int = 64) -> Any:
    return recipe.data.batch(Rng(1, 0, "data", range(size)), size, recipe.needs, torch.float32)


def loss_of(recipe: Recipe) -> torch.Tensor:
    method: Any = recipe.distiller
    return method.student_loss(batch_of(recipe), Rng(1, 0, "s", range(64))).total


def test_each_sample_moves_along_the_teacher_guided_by_its_own_w() -> None:
    recipe = recipe_of("distiller.scales.low=2", "distiller.scales.high=9", "distiller.scale=4")
    method = recipe.distiller
    assert isinstance(method, LCM)
    rng, batch = Rng(1, 0, "s", range(64)), batch_of(recipe)
    target, cond = method.teacher(batch, rng)
    w = cond["w"]
    assert (w >= 2).all() and (w <= 9).all() and w.std() > 1
    t, s = torch.full((64,), 1.0), torch.full((64,), 0.8)
    moved = ddim(target, batch.x0, t, s, batch.cond)
    plain, null = recipe.networks["target"], recipe.networks.teacher.null
    for index in (0, 33):
        one = {"label": batch.cond["label"][index : index + 1]}
        alone = plain.guided(Guidance(float(w[index]), null))
        at = slice(index, index + 1)
        torch.testing.assert_close(ddim(alone, batch.x0[at], t[at], s[at], one), moved[at], rtol=1e-4, atol=1e-5)


def test_at_scale_one_it_is_consistency_distillation() -> None:
    one = recipe_of("distiller.scales.low=1", "distiller.scales.high=1", "distiller.scale=1")
    none = recipe_of("distiller.scales=null")
    with torch.random.fork_rng():
        torch.testing.assert_close(loss_of(one), loss_of(none), rtol=1e-2, atol=1e-4)


def test_at_first_w_changes_nothing() -> None:
    recipe = recipe_of()
    batch, t = batch_of(recipe), torch.full((64,), 1.0)
    student = recipe.networks["student"]
    outputs = [student.given(w=w)(batch.x0, t, batch.cond) for w in (3.0, 15.0)]
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], recipe.networks["target"](batch.x0, t, batch.cond))


def test_both_maps_and_the_sampler_read_w() -> None:
    recipe = recipe_of("distiller.scale=7")
    for role in ("student", "student_ema"):
        for embedder in recipe.networks[role].network.time_embedding.roles[role].values():
            torch.nn.init.normal_(embedder.last.weight, std=0.1)
    before = loss_of(recipe)
    method: Any = recipe.distiller
    assert dict(method.generator.student.denoiser.inputs) == {"w": 7.0}
    for role in ("student", "student_ema"):
        for embedder in recipe.networks[role].network.time_embedding.roles[role].values():
            embedder.last.weight.data.mul_(-1)
    assert not torch.allclose(before, loss_of(recipe))


def test_guidance_costs_the_teacher_a_second_call() -> None:
    recipe = recipe_of()
    with recorded_passes() as passes:
        loss_of(recipe)
    assert [done.role for done in passes] == ["target", "target", "student_ema", "student"]


@pytest.mark.parametrize("word", ["distiller.scale=2", "distiller.scale=16"])
def test_samples_at_a_scale_that_is_not_trained_are_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"distiller.scale must lie in the trained range \[3, 15\]"):
        recipe_of(word)


@pytest.mark.parametrize("words", [["distiller.scales.low=-1"], ["distiller.scales.low=5", "distiller.scales.high=4"]])
def test_unordered_scales_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"must satisfy 0 <= low <= high"):
        recipe_of(*words)


@pytest.mark.parametrize("name", ["lcm", "guidance_distillation"])
def test_a_teacher_without_null_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="distiller needs null"):
        assemble(compose("train", ["data=gauss", "experiment=none", "run_dir=none", f"distiller={name}"]))  # type: ignore[arg-type]
