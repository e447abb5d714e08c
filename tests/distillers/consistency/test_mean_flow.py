"""MeanFlow: the identity of the average velocity, its weight, its times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimum import gauss_recipe, place
from torch import Tensor

from diffdistill.autodiff import CentralDifference, Exact
from diffdistill.denoiser import Denoiser, FlowMap
from diffdistill.distillers.consistency.mean_flow import MeanFlow, average_target
from diffdistill.errors import UserError
from diffdistill.networks.exact import Gaussian
from diffdistill.process import EDM, VELOCITY, RectifiedFlow
from diffdistill.rng import Rng

# Networks that hold an average velocity of their own process: in these two it means the same DDIM step, in Trig not.
BASES = {"edm": EDM(0.002, 80.0), "rf": RectifiedFlow()}


def times() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    t = torch.linspace(0.1, 0.95, 6, dtype=torch.float64)
    s = t * torch.linspace(0.2, 1.0, 6, dtype=torch.float64)  # the last pair is the diagonal
    return torch.randn(6, 2, generator=draw, dtype=torch.float64), t, s


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("tangent", [Exact(), CentralDifference(1e-4)], ids=["exact", "differences"])
def test_the_true_average_velocity_meets_its_target(name: str, tangent: Any) -> None:
    base = Gaussian(BASES[name], [[0.7, -0.2]], [[1.3, 0.4]])
    flow = RectifiedFlow()
    student = FlowMap(Denoiser(base.seen_as("average")).under(flow), "average")
    x, t, s = times()
    t = t.clamp(max=student.process.t_max - 1e-3)
    s = torch.minimum(s, t - 1e-3)  # forward mode cannot see through the exact network's 0 / 0 on the diagonal
    velocity = Denoiser(base).under(flow).predict(x, t, {}, VELOCITY)
    goal, _ = average_target(student, x, t, s, velocity, {}, tangent)
    torch.testing.assert_close(student.average_velocity(x, t, s, {}), goal, rtol=1e-5, atol=1e-6)
    wrong, _ = average_target(student, x, t, s, velocity + 0.1, {}, tangent)
    assert (wrong - goal).abs().max() > 0.01


def test_on_the_diagonal_the_target_is_the_teachers_velocity() -> None:
    base = Gaussian(EDM(0.002, 80.0), [[0.7, -0.2]], [[1.3, 0.4]])
    student = FlowMap(Denoiser(base).under(RectifiedFlow()), "average")  # any network that ignores s
    x, t, _ = times()
    velocity = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(average_target(student, x, t, t, velocity, {}, Exact())[0], velocity)


def loss_of(*words: str) -> tuple[Any, Tensor, Tensor]:
    """(method, its loss, unweighted squared errors [B]) on one batch of a wrong student."""
    recipe = gauss_recipe("mean_flow", *words)
    place(recipe, 0.2, 1.1)
    method = recipe.distiller
    assert isinstance(method, MeanFlow)
    batch = recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    loss = method.student_loss(batch, Rng(1, 0, "s", range(64))).total
    rng, flow = Rng(1, 0, "s", range(64)).fork("MeanFlow"), RectifiedFlow()
    student = FlowMap(recipe.networks["student"].under(flow), "average")
    t, s = method._pair(rng, student, torch.float64)
    assert batch.x0 is not None
    x = student.process.add_noise(batch.x0, rng.normal(batch.shape, torch.float64), t)
    velocity = recipe.networks["target"].under(flow).predict(x, t, {}, VELOCITY)
    goal, _ = average_target(student, x, t, s, velocity, {}, Exact())
    return method, loss, (student.average_velocity(x, t, s, {}) - goal).square().sum(1)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_weight_by_hand(power: float) -> None:
    _, loss, error = loss_of(f"distiller.power={power}", "distiller.c=0.01")
    torch.testing.assert_close(loss, (error / (error.detach() + 0.01) ** power).mean())


def test_half_a_power_makes_the_gradient_that_of_a_pseudo_huber_loss() -> None:
    error = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    (error.square() / (error.detach().square() + 0.01) ** 0.5 / 2).sum().backward()
    ours = error.grad
    huber = torch.autograd.grad(torch.sqrt(error.square() + 0.01).sum(), error)[0]
    torch.testing.assert_close(ours, huber)


def test_times_are_sorted_draws_of_one_law_and_some_end_at_t_min() -> None:
    recipe = gauss_recipe("mean_flow", "distiller.to_end=0.25")
    method: Any = recipe.distiller
    student = FlowMap(recipe.networks["student"].under(RectifiedFlow()), "average")
    t, s = method._pair(Rng(0, 0, "x", range(20_000)), student, torch.float64)
    assert (t >= s).all() and (t > student.process.t_min).all() and (s >= student.process.t_min).all()
    assert float((s == student.process.t_min).double().mean()) == pytest.approx(0.25, abs=0.02)
    level = torch.log(t / (1 - t))  # the larger of two draws: mean mu + std / sqrt(pi)
    assert float(level.mean()) == pytest.approx(-0.6 + 1.6 / 3.14159**0.5, abs=0.06)


def test_the_sampler_gives_the_network_t_min_and_ends_at_its_prediction() -> None:
    recipe = gauss_recipe("mean_flow")
    place(recipe)
    generator = recipe.distiller.generator
    law = recipe.networks.teacher
    z = Rng(0, 0, "x", range(4000)).normal((4000, 6), torch.float64)
    x = generator.sample(z, {}, Rng(0, 0, "x", range(4000)))
    # the exact flow map from t_max; beyond t_min its straight continuation
    mapped = law.mean[0] + law.std[0] / torch.hypot(law.std[0], torch.tensor(20.0)) * (20.0 * z - law.mean[0])
    assert (x - mapped).abs().max() < 0.02


@pytest.mark.parametrize("word", ["distiller.power=1.5", "distiller.to_end=-0.1", "distiller.c=0"])
def test_values_that_cannot_be_are_refused(word: str) -> None:
    with pytest.raises(UserError) as refusal:
        gauss_recipe("mean_flow", word)
    assert str(refusal.value).startswith(word.split("=")[0] + " must")
