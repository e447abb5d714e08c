"""What the methods share: order and samples of the phases, weights, terms, and faults known from other codes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimum import gauss_recipe, place
from quadrature import Fixed, denoiser

from diffdistill.config import build, compose
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching import sid, sim
from diffdistill.distillers.distribution_matching.terms import noised, pull
from diffdistill.distillers.distribution_matching.weights import (
    FlowPower,
    alpha_inverse_omega,
    alpha_sigma,
    inverse_omega,
    unit,
)
from diffdistill.errors import UserError
from diffdistill.process import RectifiedFlow
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng

FOLDER = "diffdistill.distillers.distribution_matching."
CRITIC_FIRST = ["diff_instruct", "sid", "sida", "sid_lsg", "sid_few_step", "sim", "uni_instruct"]
STUDENT_FIRST = ["dmd", "dmd2", "vsd", "f_distill"]
NAMES = CRITIC_FIRST + STUDENT_FIRST


def batch_of(recipe: Recipe, size: int = 16) -> Batch:
    return recipe.data.batch(Rng(0, 0, "data", range(size)), size, recipe.needs, recipe.networks.dtype)


def loss_of(recipe: Recipe, phase: str, batch: Batch, step: int = 0) -> Loss:
    found = next(p for p in recipe.distiller.phases(step) if p.name == phase)
    recipe.networks.train_only(found.trains)
    return found.loss(batch, Rng(0, step, phase, range(batch.shape[0])))


def mlp_recipe(name: str, *overrides: str) -> Recipe:
    words = ["data=gmm2d", f"distiller={name}", "experiment=none", "evaluation=none", "run_dir=none", *overrides]
    return assemble(compose("train", words))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_order_and_sharing_of_samples_are_the_lineages(name: str) -> None:
    recipe = gauss_recipe(name)
    names = [phase.name for phase in recipe.distiller.phases(0)]
    assert names == (["critic", "student"] if name in CRITIC_FIRST else ["student", "critic"])
    batch = batch_of(recipe)
    loss_of(recipe, names[0], batch)
    first = batch.memo["rollout"].x0
    loss_of(recipe, names[1], batch)
    assert torch.equal(batch.memo["rollout"].x0, first) == (name in STUDENT_FIRST)


@pytest.mark.parametrize("name", NAMES)
def test_both_phases_of_a_step_train_at_one_step_of_the_sampler(name: str) -> None:
    """Else the critic's mixture is not the student's; with several ranks different lengths would deadlock."""
    recipe = gauss_recipe(name, "distiller.times=[20.0,5.0,1.0,0.2]")
    drawn = []
    for step in range(24):
        batch, steps = batch_of(recipe), set()
        for phase in recipe.distiller.phases(step):
            recipe.networks.train_only(phase.trains)
            phase.loss(batch, Rng(0, step, phase.name, range(16)))
            steps |= set(batch.memo["rollout"].k.tolist())
        assert len(steps) == 1
        drawn += steps
    assert len(set(drawn)) == 4  # uniform over the steps, not stuck at one


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_and_whoever_does_not_train_has_no_dropout(name: str) -> None:
    """DMD2's code puts the teacher into train mode; Diff-Instruct's must share masks between both scores."""
    off = [f"distiller.{key}=0" for key in ("regression_weight",) if name == "dmd"]
    recipe = mlp_recipe(name, *off)
    for phase in recipe.distiller.phases(0):
        recipe.networks.train_only(phase.trains)
        assert not any(module.training for module in recipe.networks.teacher.modules())
        for role in recipe.networks.owned:
            if role != "discriminator" and recipe.networks.modes.get(role) == "copy":
                module: Any = recipe.networks[role].network
                assert module.training == (role in phase.trains)


def test_the_normaliser_is_one_per_sample_not_one_per_batch() -> None:
    """FastVideo divides by the batch's mean: equal at batch size 1 only."""
    x0 = torch.tensor([[1.0, 1.0], [0.1, 0.3]])
    d, t = torch.zeros_like(x0), torch.full((2,), 0.5)
    assert inverse_omega(x0, d, t, Fixed()).tolist() == pytest.approx([1.0, 5.0])


def test_omega_is_floored_and_finite_where_student_and_teacher_agree() -> None:
    """DMD2's code has no floor; its nan_to_num turns the infinity into the largest float."""
    x0 = torch.ones(2, 4)
    assert inverse_omega(x0, x0, torch.ones(2), Fixed()).tolist() == pytest.approx([1e5, 1e5])


def test_omega_is_taken_in_float32_and_carries_no_gradient() -> None:
    x0 = (torch.full((1, 4), 3.0e-4, dtype=torch.bfloat16)).requires_grad_()
    omega = inverse_omega(x0, torch.zeros_like(x0), torch.ones(1), Fixed())
    assert omega.dtype == torch.float32 and not omega.requires_grad


def test_the_normalised_direction_is_scale_free_and_of_unit_mean_for_sds() -> None:
    """With omega, multiplying data and student by k leaves the direction; D_fake = x0 makes mean|w g| one."""
    x0 = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    d = torch.randn_like(x0)
    t = torch.full((16,), 0.5, dtype=torch.float64)
    w = inverse_omega(x0, d, t, Fixed())
    assert torch.allclose(inverse_omega(5 * x0, 5 * d, t, Fixed()) * 5, w)
    ones = torch.ones(16, dtype=torch.float64)
    assert torch.allclose((w.view(-1, 1, 1, 1) * (x0 - d)).abs().flatten(1).mean(1), ones)


def test_the_other_weights_are_their_formulas() -> None:
    x0, d, t = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0.25, 0.75])
    flow = RectifiedFlow()
    assert unit(x0, d, t, flow).tolist() == [1, 1]
    assert alpha_sigma(x0, d, t, flow).tolist() == pytest.approx([0.1875, 0.1875])
    assert alpha_inverse_omega(x0, d, t, flow).tolist() == pytest.approx([0.75, 0.25])
    assert FlowPower(1, 0)(x0, d, t, flow).tolist() == pytest.approx([0.75, 0.25])
    assert FlowPower(2, 2)(x0, d, t, flow).tolist() == pytest.approx([9.0, 1 / 9])
    # in a process of another scale the same level has the same weight
    level = FlowPower(1, 1)(x0, d, torch.tensor([0.5, 0.5]), Fixed())
    assert level.tolist() == pytest.approx([0.8 / 0.6] * 2)


def test_vsd_is_alpha_sigma_omega_times_dmd_per_sample() -> None:
    n = noised(denoiser(0.7, 1.3), denoiser(-0.2, 0.9), *_draw(), {}, through=False)
    vsd = alpha_sigma(n.x0, n.d_target, n.t, n.process) * pull(n)
    dmd = inverse_omega(n.x0, n.d_target, n.t, n.process) * pull(n)
    omega = (n.x0 - n.d_target).abs().mean(1)
    torch.testing.assert_close(vsd, 0.8 * 0.6 * omega * dmd)


def test_the_pull_does_not_change_when_both_denoisers_move_alike_and_equals_the_target_form() -> None:
    x0, eps, t = _draw()
    x0.requires_grad_()
    n = noised(denoiser(0.7, 1.3), denoiser(-0.2, 0.9), x0, eps, t, {}, through=False)
    (ours,) = torch.autograd.grad(pull(n).sum(), x0)
    goal = (x0 - (n.d_fake - n.d_target)).detach()
    (theirs,) = torch.autograd.grad(0.5 * (x0 - goal).square().mean(1).sum(), x0)
    torch.testing.assert_close(ours, theirs)
    moved = type(n)(n.process, n.x0, n.x_t, n.t, n.d_target + 3, n.d_fake + 3, n.d_projected + 3)
    (again,) = torch.autograd.grad(pull(moved).sum(), x0)
    torch.testing.assert_close(again, ours)


def test_sim_l2_under_omega_is_sid_at_alpha_one_bit_for_bit() -> None:
    x0, eps, t = _draw()
    target, fake = denoiser(0.7, 1.3), denoiser(-0.2, 0.9)
    ours = sim.generator_loss(target, fake, x0, eps, t, {}, weight=inverse_omega, distance="l2")
    assert torch.equal(ours, sid.generator_loss(target, fake, x0, eps, t, {}, weight=inverse_omega, alpha=1.0))


@pytest.mark.parametrize("name", ["sid", "sim", "sida", "uni_instruct", "sid_lsg", "sid_few_step"])
def test_a_sample_does_not_feel_the_others(name: str) -> None:
    """Norms over the whole batch (as in Uni-Instruct's code) would couple them."""
    recipe = gauss_recipe(name)
    place(recipe, 0.3, 1.2)
    module = __import__(FOLDER + name, fromlist=["generator_loss"])
    own = {"sid": {"alpha": 1.2}, "sida": {"alpha": 1.0}, "sim": {"distance": "pseudo_huber", "c": 0.1}}
    own |= {"sid_lsg": {"alpha": 1.0}, "sid_few_step": {"alpha": 1.0}, "uni_instruct": {"divergence": "js"}}
    rng = Rng(0, 0, "x", range(8))
    x0, eps = rng.normal((8, 6), torch.float64), rng.normal((8, 6), torch.float64)
    t = torch.linspace(0.1, 5, 8, dtype=torch.float64)
    views = recipe.networks["target"], recipe.networks["fake_score"]
    whole = module.generator_loss(*views, x0, eps, t, {}, weight=inverse_omega, **own[name])
    part = module.generator_loss(*views, x0[3:4], eps[3:4], t[3:4], {}, weight=inverse_omega, **own[name])
    torch.testing.assert_close(whole[3:4], part)


def test_a_fitted_critic_satisfies_the_identity_of_sid() -> None:
    """E <u(x_t), D_fake(x_t) - x0> = 0 for any u, for the critic that least squares gives on the student's samples."""
    rng = Rng(0, 0, "fit", range(200_000))
    x0 = -0.2 + 0.9 * rng.normal((200_000, 1), torch.float64)
    x_t = 0.8 * x0 + 0.6 * rng.normal((200_000, 1), torch.float64)
    ones = torch.ones_like(x_t)
    fitted = torch.linalg.lstsq(torch.cat([x_t, ones], 1), x0).solution
    residual = torch.cat([x_t, ones], 1) @ fitted - x0
    exact = denoiser(-0.2, 0.9)(x_t, torch.full((200_000,), 0.5, dtype=torch.float64), {}) - x0
    for u in (x_t, x_t.sin(), x_t**2):
        assert abs(float((u * residual).mean())) < 5 * float((u * residual).std()) / 200_000**0.5
        assert abs(float((u * exact).mean())) < 5 * float((u * exact).std()) / 200_000**0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_hyperparameter_out_of_range_is_named(name: str) -> None:
    bad = {
        "student_every": 0,
        "regression_weight": -1.0,
        "null_share": 1.0,
        "gan_weight": -1.0,
        "student_from": -1,
        "gan_from": -1,
        "num_steps": 0,
        "c": -1.0,
        "ratio_bins": 0,
        "ratio_rate": 1.0,
        "r1_weight": -1.0,
        "r1_std": 0.0,
        "alignment_threshold": 2.0,
        "alignment_weight": -1.0,
        "alignment_steps": 0,
    }
    node = compose("train", [f"distiller={name}", "run_dir=none", "experiment=none"]).distiller
    for key, value in bad.items():
        if key in node:
            part = build(
                compose("train", [f"distiller={name}", "run_dir=none", "experiment=none", f"distiller.{key}={value}"])[
                    "distiller"
                ]
            )
            with pytest.raises(UserError, match=key):
                part.func.needs(**part.keywords)


def _draw(size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = Rng(0, 0, "draw", range(size))
    z, eps = (rng.normal((size, 1), torch.float64) for _ in range(2))
    return -0.2 + 0.9 * z, eps, torch.full((size,), 0.5, dtype=torch.float64)


def test_the_update_counters_are_ceil_n_over_every() -> None:
    """FastGen's iteration is one or the other, so 5 means four critic steps there."""
    distiller = gauss_recipe("dmd2", "distiller.student_every=5").distiller
    names = [[phase.name for phase in distiller.phases(step)] for step in range(11)]
    assert sum(n.count("student") for n in names) == math.ceil(11 / 5)
    assert sum(n.count("critic") for n in names) == 11
