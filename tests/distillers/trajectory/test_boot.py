"""BOOT: its steps in the signal are DDIM's, it asks for no data, its boundary is the teacher's at t_max."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from optimum import gauss_recipe, place

from diffdistill.denoiser import Denoiser
from diffdistill.distillers.trajectory.boot import Boot, signal_step
from diffdistill.networks.exact import mixture_on_circle
from diffdistill.process import EDM, VP, NoiseProcess, RectifiedFlow, Trig, expand
from diffdistill.rng import Rng
from diffdistill.solvers import Grid, ddim, karras, uniform

PROCESSES: dict[str, tuple[NoiseProcess, Grid]] = {
    "edm": (EDM(0.002, 20.0), karras),
    "vp": (VP(t_max=900.0), uniform),
    "rf": (RectifiedFlow(t_min=0.01), uniform),
    "trig": (Trig(t_min=0.01, t_max=1.5), uniform),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_steps_in_the_signal_telescope_to_the_ddim_sampler(name: str) -> None:
    process, grid = PROCESSES[name]
    teacher = Denoiser(mixture_on_circle(process, 8, 1.0, 0.1))
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = {"label": torch.full((6,), 8)}
    times = [torch.full((6,), time, dtype=torch.float64) for time in grid(process, 12)]
    y = teacher(process.add_noise(torch.zeros_like(z), z, times[0]), times[0], cond)
    x = process.add_noise(y, z, times[0])
    for t, s in pairwise(times):
        y = y + expand(signal_step(process, t, s), y) * (teacher(process.add_noise(y, z, t), t, cond) - y)
        x = ddim(teacher, x, t, s, cond)
        torch.testing.assert_close(process.add_noise(y, z, s), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("process", "t", "s", "wanted"),
    [
        (RectifiedFlow(), 0.8, 0.5, 1 - 0.5 * 0.2 / (0.8 * 0.5)),
        (RectifiedFlow(), 1.0, 0.5, 1.0),
        (EDM(), 4.0, 1.0, 0.75),
        (Trig(), 1.2, 0.7, 1 - float(torch.tan(torch.tensor(0.7)) / torch.tan(torch.tensor(1.2)))),
    ],
)
def test_kappa_in_closed_form(process: NoiseProcess, t: float, s: float, wanted: float) -> None:
    got = signal_step(process, torch.tensor([t]).double(), torch.tensor([s]).double())
    assert float(got) == pytest.approx(wanted, rel=1e-6)


def terms_of(recipe: Any, batch: Any) -> Any:
    return recipe.distiller.student_loss(batch, Rng(1, 0, "student", range(64))).terms


def test_it_draws_from_noise_alone() -> None:
    recipe = gauss_recipe("boot")
    assert recipe.needs == frozenset()
    batch = recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    assert batch.x0 is None and set(terms_of(recipe, batch)) == {"bootstrap", "boundary"}


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_loss_by_hand(power: float) -> None:
    recipe = gauss_recipe("boot", f"distiller.power={power}", "distiller.boundary_weight=0.3")
    place(recipe, 0.2, 1.1)
    method = recipe.distiller
    assert isinstance(method, Boot)
    batch = recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    got = terms_of(recipe, batch)
    rng = Rng(1, 0, "student", range(64)).fork("Boot")
    student, target, process = method.generator.student, recipe.networks["target"], recipe.networks.teacher.process
    t, s = method.pairs(rng, process)
    z = rng.normal(batch.shape, torch.float64)
    y_t, y_s = student(z, t, {}), student(z, s, {})  # type: ignore[operator]
    kappa = 1 - s / t  # of EDM
    goal = y_t + kappa[:, None] * (target(y_t + t[:, None] * z, t, {}) - y_t)
    wanted = ((y_s - goal).square().mean(1) / kappa**power).mean()
    torch.testing.assert_close(got["bootstrap"], wanted)
    t_max = torch.full_like(t, process.t_max)
    edge = (student(z, t_max, {}) - target(process.t_max * z, t_max, {})).square().mean()  # type: ignore[operator]
    torch.testing.assert_close(got["boundary"], 0.3 * edge)


def test_the_target_carries_no_gradient() -> None:
    recipe = gauss_recipe("boot", "distiller.boundary_weight=0")
    place(recipe, 0.2, 1.1)
    recipe.networks.train_only(("student",))
    method: Any = recipe.distiller
    frozen = torch.full((64,), 1.0, dtype=torch.float64)
    method.pairs = lambda rng, process: (3 * frozen, frozen)
    batch = recipe.data.batch(Rng(1, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    terms_of(recipe, batch)["bootstrap"].backward()
    student = recipe.networks["student"].network
    got = student.mean.grad.clone()
    rng = Rng(1, 0, "student", range(64)).fork("Boot")
    z = rng.normal(batch.shape, torch.float64)
    student.mean.grad = None
    signal, kappa = method.generator.student, 2 / 3
    y = signal(z, 3 * frozen, {}).detach()
    goal = y + kappa * (recipe.networks["target"](y + 3 * z, 3 * frozen, {}) - y)
    ((signal(z, frozen, {}) - goal).square().mean(1) / kappa**2).mean().backward()
    torch.testing.assert_close(got, student.mean.grad)
