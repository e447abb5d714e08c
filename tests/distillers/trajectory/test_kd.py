"""Knowledge distillation: regression on the stored pairs and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from optimum import gauss_recipe, place

from diffdistill.distillers.trajectory.kd import KD
from diffdistill.errors import UserError
from diffdistill.rng import Rng


def test_the_loss_is_the_distance_to_the_stored_sample_from_the_stored_noise() -> None:
    recipe = gauss_recipe("kd", "distiller.times=[2.5]")
    place(recipe, 0.2, 1.1)
    method = recipe.distiller
    assert isinstance(method, KD) and recipe.needs == frozenset({"pair"})
    batch = recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    pair = batch.pair
    assert pair is not None
    loss = method.student_loss(batch, Rng(1, 0, "student", range(64))).terms["regression"]
    student = recipe.networks["student"]
    wanted = (student(2.5 * pair.z, torch.full((64,), 2.5, dtype=torch.float64), pair.cond) - pair.x0).square().mean()
    torch.testing.assert_close(loss, wanted)


def test_shuffled_pairs_cannot_be_learned() -> None:
    """Data and noise that are out of step leave the whole variance: a check of the loader's alignment."""
    recipe = gauss_recipe("kd", "sampler.num_steps=40")
    place(recipe)
    method = recipe.distiller
    assert isinstance(method, KD)
    batch = recipe.data.batch(Rng(1, 0, "data", range(512)), 512, recipe.needs, torch.float64)
    assert batch.pair is not None
    shuffled = replace(batch, pair=replace(batch.pair, x0=batch.pair.x0.roll(1, 0)))
    aligned, floor = (method.student_loss(b, Rng(1, 0, "student", range(512))).total for b in (batch, shuffled))
    variance = recipe.networks.teacher.std.detach().square().mean()
    assert aligned < 1e-4 and float(floor) == pytest.approx(2 * float(variance), rel=0.1)


def test_more_than_one_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"distiller.times must hold one time"):
        gauss_recipe("kd", "distiller.times=[20.0,2.0]")
