"""sCM: its tangent and its loss against closed forms, and the faults of public ports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimum import gauss_recipe, place
from torch import Tensor

from diffdistill.autodiff import CentralDifference, Exact
from diffdistill.config import compose
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.consistency.scm import SCM, consistency_tangent, held, normalised
from diffdistill.errors import UserError
from diffdistill.generator import constant_inputs
from diffdistill.networks.exact import Gaussian, mixture_on_circle
from diffdistill.process import EDM, VELOCITY, NoiseProcess, RectifiedFlow, Trig
from diffdistill.recipe import assemble
from diffdistill.rng import Rng

SIGMA_DATA = 0.5
DIFFERENCES = ("distiller/tangent=difference", "distiller.tangent.step=0.1")
TEACHERS: dict[str, NoiseProcess] = {"edm": EDM(0.002, 80.0), "rf": RectifiedFlow(), "trig": Trig(sigma_data=0.7)}


def points(size: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    t = torch.linspace(0.05, 1.5, size, dtype=torch.float64)
    return torch.randn(size, 2, generator=draw, dtype=torch.float64) * SIGMA_DATA, t


def under_trig(network: Any) -> Denoiser:
    return Denoiser(network).under(Trig(sigma_data=SIGMA_DATA))


@pytest.mark.parametrize("name", TEACHERS)
def test_the_tangent_of_the_true_map_is_zero(name: str) -> None:
    base = Gaussian(TEACHERS[name], [[0.7, -0.2]], [[1.3, 0.4]])
    x, t = points()
    velocity = under_trig(base).predict(x, t, {}, VELOCITY)
    g, _ = consistency_tangent(under_trig(base.seen_as("flow_map")), x, t, velocity, {}, 1.0, Exact())
    assert g.abs().max() < 1e-9
    wrong, _ = consistency_tangent(under_trig(base), x, t, velocity, {}, 1.0, Exact())
    assert wrong.abs().max() > 0.05  # the denoiser is no flow map


def test_matched_gaussian_data_have_the_papers_closed_form() -> None:
    """mu = 0, S = sigma_data: dx/dt = 0, f(x, t) = x and F = -tan(t / 2) x / sigma_data."""
    base = Gaussian(Trig(sigma_data=SIGMA_DATA), [[0.0, 0.0]], [[SIGMA_DATA, SIGMA_DATA]])
    x, t = points()
    assert under_trig(base).predict(x, t, {}, VELOCITY).abs().max() < 1e-12
    ours = under_trig(base.seen_as("flow_map")).predict(x, t, {}, VELOCITY)
    torch.testing.assert_close(ours, -torch.tan(t / 2)[:, None] * x)


def total_derivative(student: Denoiser, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """df/dt along the velocity, by a small step of the map itself."""
    h = 1e-5

    def at(share: float) -> Tensor:
        return student(x + share * velocity, t + share, {})

    return (at(h) - at(-h)) / (2 * h)


def test_the_tangent_is_cos_t_times_the_maps_derivative() -> None:
    base = Gaussian(EDM(0.002, 80.0), [[0.7, -0.2]], [[1.3, 0.4]])
    student, (x, t) = under_trig(base), points()
    velocity = under_trig(Gaussian(EDM(0.002, 80.0), [[0.1, 0.3]], [[0.6, 0.9]])).predict(x, t, {}, VELOCITY)
    g, _ = consistency_tangent(student, x, t, velocity, {}, 1.0, Exact())
    wanted = torch.cos(t)[:, None] * total_derivative(student, x, t, velocity)
    torch.testing.assert_close(g, wanted, rtol=1e-6, atol=1e-7)


def test_without_ramp_it_is_velocity_matching() -> None:
    base = Gaussian(EDM(0.002, 80.0), [[0.7, -0.2]], [[1.3, 0.4]])
    student, (x, t) = under_trig(base.seen_as("generator")), points()
    velocity = under_trig(base).predict(x, t, {}, VELOCITY)
    g, ours = consistency_tangent(student, x, t, velocity, {}, 0.0, Exact())
    torch.testing.assert_close(g, -torch.cos(t).square()[:, None] * (ours - velocity))
    half, _ = consistency_tangent(student, x, t, velocity, {}, 0.5, Exact())
    whole, _ = consistency_tangent(student, x, t, velocity, {}, 1.0, Exact())
    torch.testing.assert_close(half, (g + whole) / 2)


def test_differences_agree_with_forward_mode_to_second_order() -> None:
    network = mixture_on_circle(EDM(0.002, 80.0), 8, 1.0, 0.2)
    cond = {"label": torch.full((6,), 8)}
    x, t = points()
    velocity = under_trig(network).predict(x, t, cond, VELOCITY)
    exact, _ = consistency_tangent(under_trig(network), x, t, velocity, cond, 1.0, Exact())
    errors = []
    for step in (0.04, 0.02, 0.01):
        near, _ = consistency_tangent(under_trig(network), x, t, velocity, cond, 1.0, CentralDifference(step))
        errors.append(float((near - exact).norm()))
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.8


def student_gradient(recipe: Any, batch: Any, rng: Rng) -> Tensor:
    recipe.networks.train_only(("student",))
    recipe.networks.zero_grad()
    recipe.distiller.student_loss(batch, rng).total.backward()
    student = recipe.networks["student"].network
    return torch.cat([student.mean.grad.flatten(), student.std.grad.flatten()])


def test_the_prior_weight_is_counted_once() -> None:
    """With r = 1 and no normalisation the gradient is the limit of discrete consistency distillation with weight
    1 / (sigma_data tan t) / (t - r); three public ports multiply by 1 / (sigma_data tan t) again."""
    recipe = gauss_recipe("scm", "distiller.normalise=null", "distiller.warmup=0")
    place(recipe, 0.2, 1.1)
    method: Any = recipe.distiller
    frozen = torch.linspace(0.2, 1.4, 256, dtype=torch.float64)
    method.law = lambda rng, process, dtype: frozen
    batch = recipe.data.batch(Rng(1, 0, "data", range(256)), 256, recipe.needs, torch.float64)
    got = student_gradient(recipe, batch, Rng(1, 0, "student", range(256)))
    x, t, velocity, _ = method.states(batch, Rng(1, 0, "student", range(256)).fork("SCM"))
    student, network = method.student, recipe.networks["student"].network
    recipe.networks.zero_grad()
    h = 1e-5
    goal = student(x - h * velocity, t - h, {}).detach()
    weight = 1 / (SIGMA_DATA * torch.tan(t)) / h
    # |f - f^-|^2 has the gradient 2 (f - f^-) df, the loss in F twice -F.g: the same once cos t and sin t are put in
    (weight * (student(x, t, {}) - goal).square().mean(1)).mean().backward()
    wanted = torch.cat([network.mean.grad.flatten(), network.std.grad.flatten()])
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_the_normalised_tangent_is_shorter_than_one_and_keeps_its_direction() -> None:
    g = torch.tensor([[3.0, 4.0], [3e-4, 4e-4], [0.0, 0.0]], dtype=torch.float64)
    short = normalised(g, 0.1)
    torch.testing.assert_close(short.norm(dim=1), torch.tensor([5 / 5.1, 5e-4 / 0.1005, 0.0], dtype=torch.float64))
    torch.testing.assert_close(short[0] / short[0].norm(), g[0] / 5)
    assert normalised(g, None) is g


def test_the_gradient_is_minus_twice_the_tangent_times_that_of_f() -> None:
    recipe = gauss_recipe("scm", "distiller.normalise=0.1", "distiller.warmup=0")
    place(recipe, 0.2, 1.1)
    method: Any = recipe.distiller
    batch = recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    got = student_gradient(recipe, batch, Rng(1, 0, "student", range(64)))
    x, t, velocity, _ = method.states(batch, Rng(1, 0, "student", range(64)).fork("SCM"))
    g, _ = consistency_tangent(method.student, x, t, velocity, {}, 1.0, Exact())
    recipe.networks.zero_grad()
    raw = method.student.predict(x, t, {}, VELOCITY) / SIGMA_DATA
    (-2 * normalised(g, 0.1) * raw).mean().backward()
    network = recipe.networks["student"].network
    torch.testing.assert_close(got, torch.cat([network.mean.grad.flatten(), network.std.grad.flatten()]))


def test_data_velocities_are_the_teachers_on_average() -> None:
    """sCT's states are those of sCD, and its dx/dt is the teacher's in expectation: cos t z - sin t x0."""
    recipe = gauss_recipe("sct")
    assert "target" not in recipe.networks
    method: Any = recipe.distiller
    size, t = 400_000, 0.9
    method.law = lambda rng, process, dtype: torch.full((size,), t, dtype=torch.float64)
    batch = recipe.data.batch(Rng(1, 0, "data", range(size)), size, recipe.needs, torch.float64)
    x, times, velocity, _ = method.states(batch, Rng(1, 0, "s", range(size)))
    teacher = Denoiser(recipe.networks.teacher).under(Trig(sigma_data=SIGMA_DATA))
    gap = velocity - teacher.predict(x, times, {}, VELOCITY)
    error = gap.std(0) / math.sqrt(size)
    assert (gap.mean(0).abs() < 4 * error).all()
    assert ((gap * x).mean(0).abs() < 4 * (gap * x).std(0) / math.sqrt(size)).all()


def test_the_learned_weight_settles_at_the_log_of_the_error() -> None:
    recipe = gauss_recipe("scm", "distiller.adaptive=true", "distiller.warmup=0")
    place(recipe, 0.2, 1.1)
    method = recipe.distiller
    assert isinstance(method, SCM) and method.phases(0)[0].trains == ("student", "weight")
    batch = recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    plain = gauss_recipe("scm", "distiller.adaptive=false", "distiller.warmup=0")
    place(plain, 0.2, 1.1)
    error = plain.distiller.student_loss(batch, Rng(1, 0, "s", range(64))).total.detach()  # type: ignore[attr-defined]
    weight: Any = recipe.networks["weight"]
    losses = {}
    for offset in (-0.1, 0.0, 0.1):
        with torch.no_grad():
            weight.last.bias.fill_(float(error.log()) + offset)
        losses[offset] = float(method.student_loss(batch, Rng(1, 0, "s", range(64))).total)
    assert losses[0.0] < losses[-0.1] and losses[0.0] < losses[0.1]
    assert losses[0.0] == pytest.approx(1 + float(error.log()), rel=1e-5)


def test_times_near_the_ends_leave_room_for_differences() -> None:
    process = Trig(t_min=0.01, t_max=1.5)
    t = torch.tensor([0.02, 0.7, 1.5], dtype=torch.float64)
    assert torch.equal(held(t, process, 0.0), t)
    moved = held(t, process, gauss_recipe("scm", *DIFFERENCES).distiller.room)  # type: ignore[attr-defined]
    reach = torch.cos(moved) * torch.sin(moved) * 0.1
    assert (moved - reach >= process.t_min).all() and (moved + reach <= process.t_max).all()


def test_at_t_min_where_a_boundary_kind_has_no_velocity_nothing_is_drawn() -> None:
    words = ["data=digits", "distiller=scm", "experiment=none", "evaluation=none", "run_dir=none", "distiller.warmup=0"]
    recipe = assemble(compose("train", words))  # type: ignore[arg-type]
    method: Any = recipe.distiller
    method.law = lambda rng, process, dtype: torch.full((2,), process.t_min)
    batch = recipe.data.batch(Rng(1, 0, "data", range(2)), 2, recipe.needs, torch.float32)
    assert bool(torch.isfinite(method.student_loss(batch, Rng(1, 0, "s", range(2))).total))


def test_the_law_of_t_is_the_papers() -> None:
    """t = arctan(e^tau / sigma_data) with tau normal."""
    recipe = gauss_recipe("scm", "distiller.law.mean=-0.5", "distiller.law.std=0.7")
    method: Any = recipe.distiller
    size = 20_000
    batch = recipe.data.batch(Rng(1, 0, "data", range(size)), size, recipe.needs, torch.float64)
    t = method.states(batch, Rng(1, 0, "s", range(size)))[1]
    tau = torch.log(SIGMA_DATA * torch.tan(t))
    assert abs(float(tau.mean()) + 0.5) < 0.02 and abs(float(tau.std()) - 0.7) < 0.02


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("distiller.velocity=student", "distiller.velocity must be"),
        ("distiller.normalise=0", "distiller.normalise must be"),
        ("distiller.warmup=-1", "distiller.warmup must be"),
        ("distiller.sigma_data=0", "distiller.sigma_data must be"),
    ],
)
def test_values_that_cannot_be_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        gauss_recipe("scm", word)
    assert str(refusal.value).startswith(message)


SCALES = "distiller.scales={_target_:diffdistill.distillers.guidance.scales.UniformScale,low:1.0,high:4.0}"


@pytest.mark.parametrize("name", ["scm", "tbcm"])
def test_a_student_that_takes_the_scale_follows_the_teacher_guided_by_it(name: str) -> None:
    """At first w changes nothing in the student: without ramp g is the guided velocity minus the plain one."""
    words = ["data=gmm2d", "experiment=none", "evaluation=none", "run_dir=none", SCALES, "distiller.scale=2.0"]
    recipe: Any = assemble(compose("train", [*words, f"distiller={name}"]))  # type: ignore[arg-type]
    method, networks = recipe.distiller, recipe.networks
    batch = recipe.data.batch(Rng(1, 0, "data", range(32)), 32, recipe.needs, torch.float32)
    x_t, t, velocity, cond = method.states(batch, Rng(1, 0, "s", range(32)))
    w, label = cond["w"], {"label": cond["label"]}
    assert 1 <= w.min() < 1.5 and 3.5 < w.max() <= 4 and len(w) == len(x_t)
    plain = networks["target"].under(Trig(sigma_data=method.sigma_data))
    null = {key: value.expand(len(w)) for key, value in networks.teacher.null.items()}
    v_c, v_0 = (plain.predict(x_t, t, c, VELOCITY) for c in (label, null))
    torch.testing.assert_close(velocity, v_0 + w[:, None] * (v_c - v_0), rtol=1e-4, atol=1e-4)
    g, ours = consistency_tangent(method.student, x_t, t, velocity, cond, 0.0, Exact())
    torch.testing.assert_close(ours, v_c.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g, torch.cos(t)[:, None].square() * (velocity - v_c), rtol=1e-3, atol=1e-3)
    assert constant_inputs(method.generator)["w"] == 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distiller=scm", SCALES, "distiller.scale=5"], r"scale must lie in the trained range \[1, 4\]"),
        (["distiller=sct", SCALES], "scales must be null with velocity=data"),
    ],
)
def test_scales_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        assemble(compose("train", ["data=gmm2d", "experiment=none", "evaluation=none", "run_dir=none", *words]))
