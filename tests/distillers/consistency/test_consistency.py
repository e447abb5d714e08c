"""Consistency distillation against the closed form of a Gaussian, and what it asks of networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum import gauss_recipe, place
from torch import Tensor

from diffdistill.distillers.consistency.consistency import Consistency
from diffdistill.distillers.consistency.pairs import inverse_gap, unit
from diffdistill.errors import UserError
from diffdistill.losses import squared
from diffdistill.process import NoiseProcess, expand
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng

T, R = 3.0, 1.2


def fixed(rng: Rng, process: NoiseProcess) -> tuple[Tensor, Tensor]:
    t = torch.full((len(rng),), T, dtype=torch.float64)
    return t, torch.full_like(t, R)


def exact_step(denoiser: Any, x_t: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
    """The Gaussian's PF-ODE in closed form: (x - mean) / sqrt(std^2 + sigma^2) stays."""
    mean, std = denoiser.network.mean.detach(), denoiser.network.std.detach()
    return mean + (x_t - mean) * torch.hypot(std, expand(s, x_t)) / torch.hypot(std, expand(t, x_t))


def recipe_of(*overrides: str, **fields: Any) -> Recipe:
    recipe = gauss_recipe("consistency", *overrides)
    assert isinstance(recipe.distiller, Consistency)
    for name, value in {"pairs": fixed, "solver": exact_step, "distance": squared, **fields}.items():
        setattr(recipe.distiller, name, value)
    return recipe


def mean_gradient(recipe: Recipe, repeats: int = 40, size: int = 4096) -> dict[str, tuple[Tensor, Tensor]]:
    """Per student parameter, mean gradient and standard error per coordinate, of the sum over coordinates."""
    found: dict[str, list[Tensor]] = {}
    networks = recipe.networks
    networks.train_only(("student",))
    for step in range(repeats):
        draw = Rng(9, step, "data", range(size))
        batch = recipe.data.batch(draw, size, recipe.needs, networks.dtype)
        loss = recipe.distiller.phases(step)[0].loss(batch, Rng(9, step, "student", range(size)))
        (loss.total * batch.shape[1]).backward()  # `squared` is a mean over coordinates
        for name, weight in networks.named_weights("student"):
            assert weight.grad is not None
            found.setdefault(name, []).append(weight.grad[0].clone())
        networks.zero_grad()
    stacked = {name: torch.stack(values) for name, values in found.items()}
    return {name: (v.mean(0), v.std(0) / repeats**0.5) for name, v in stacked.items()}


def analytic(mean: Tensor, std: Tensor, m: Tensor, s: Tensor, t_min: float) -> dict[str, Tensor]:
    """E d/d(m, s) (f(x_t) - sg f(x_r))^2 for x_t = mean + q(t) xi, x_r on its trajectory, f the map of N(m, s^2).

    f(x, t) = m + k(t) (x - m), k(t) = q'(t_min) / q'(t) with q'(t)^2 = s^2 + t^2.
    """

    def k(time: float) -> Tensor:
        return torch.hypot(s, torch.full_like(s, t_min)) / torch.hypot(s, torch.full_like(s, time))

    q_t, q_r = torch.hypot(std, torch.full_like(std, T)), torch.hypot(std, torch.full_like(std, R))
    end, here = torch.hypot(s, torch.full_like(s, t_min)), torch.hypot(s, torch.full_like(s, T))
    slope = s * (1 / (end * here) - end / here**3)
    shift = (k(R) - k(T)) * (m - mean)
    return {
        "mean": 2 * shift * (1 - k(T)),
        "std": 2 * slope * ((k(T) * q_t - k(R) * q_r) * q_t - shift * (m - mean)),
    }


@pytest.mark.parametrize(("off", "factor"), [(0.0, 1.0), (0.4, 1.0), (0.0, 1.3), (-0.3, 0.8)])
@pytest.mark.parametrize("decay", ["null", "0.9"])
def test_the_gradient_is_the_analytic_one(off: float, factor: float, decay: str) -> None:
    """Zero at the true map with an exact step; away from it the closed form, in the mean and in the scale."""
    recipe = recipe_of(f"distiller.target_decay={decay}")
    law = place(recipe, off, factor)
    expected = analytic(law["mean"][0], law["std"][0], law["mean"][0] + off, law["std"][0] * factor, 0.002)
    for name, (mean, error) in mean_gradient(recipe).items():
        assert ((mean - expected[name]).abs() <= 5 * error + 1e-9).all(), (name, mean, expected[name])
        if off or factor != 1:
            assert (error < 0.1 * expected["std"].abs().max()).all()


def test_the_weight_multiplies_the_distance_of_a_pair() -> None:
    found = []
    for weight in (unit, inverse_gap):
        recipe = recipe_of("distiller.target_decay=null", weight=weight)
        place(recipe, 0.4, 1.3)
        batch = recipe.data.batch(Rng(0, 0, "data", range(64)), 64, recipe.needs, recipe.networks.dtype)
        found.append(float(recipe.distiller.phases(0)[0].loss(batch, Rng(0, 0, "student", range(64))).total.detach()))
    assert found[1] == pytest.approx(found[0] / (T - R), rel=1e-12)


def test_consistency_training_has_the_gradient_of_distillation_as_pairs_close_up() -> None:
    """Without a teacher x_r has the noise of x_t: unbiased in the limit only (arXiv:2303.01469, theorem 2)."""

    def close(rng: Rng, process: NoiseProcess) -> tuple[Tensor, Tensor]:
        t = torch.full((len(rng),), T, dtype=torch.float64)
        return t, 0.99 * t

    found = {}
    for name, solver in (("training", None), ("distillation", exact_step)):
        recipe = recipe_of("distiller.target_decay=null", pairs=close, solver=solver)
        place(recipe, 0.4, 1.3)
        found[name] = mean_gradient(recipe, repeats=60)
    for key, (mean, error) in found["training"].items():
        reference, other = found["distillation"][key]
        assert ((mean - reference).abs() <= 5 * (error + other) + 0.05 * reference.abs()).all(), key


def test_no_gradient_reaches_the_target() -> None:
    recipe = recipe_of("distiller.target_decay=0.9")
    place(recipe, 0.2, 1.1)
    for weight in recipe.networks.weights("student_ema"):
        weight.requires_grad_(True)
    batch = recipe.data.batch(Rng(0, 0, "data", range(8)), 8, recipe.needs, recipe.networks.dtype)
    recipe.networks.train_only(("student",))
    recipe.distiller.phases(0)[0].loss(batch, Rng(0, 0, "student", range(8))).total.backward()
    assert all(weight.grad is None for weight in recipe.networks.weights("student_ema"))
    assert all(weight.grad is not None for weight in recipe.networks.weights("student"))


def test_both_calls_of_the_student_draw_the_same_dropout_mask() -> None:
    recipe = recipe_of("distiller.target_decay=null")
    seeds: list[int] = []
    student = recipe.networks["student"].network
    handle = student.register_forward_hook(lambda *call: seeds.append(int(torch.rand(1) * 2**31)))
    batch = recipe.data.batch(Rng(0, 0, "data", range(8)), 8, recipe.needs, recipe.networks.dtype)
    torch.manual_seed(1)
    recipe.distiller.phases(0)[0].loss(batch, Rng(0, 0, "student", range(8)))
    first = list(seeds)
    recipe.distiller.phases(0)[0].loss(batch, Rng(0, 1, "student", range(8)))
    handle.remove()
    assert len(first) == 2
    assert first[0] == first[1]
    assert seeds[2] == seeds[3] != first[0]
    expected = torch.manual_seed(1)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected.manual_seed(1)))


def test_the_targets_average_follows_the_students_mode_and_starts_equal() -> None:
    from diffdistill.config import compose
    from diffdistill.recipe import assemble

    words = ["data=gmm2d", "distiller=consistency", "experiment=none", "run_dir=none", "lora.rank=2"]
    networks = assemble(compose("train", [*words, "roles.student=lora"])).networks  # type: ignore[arg-type]
    assert networks.modes["student_ema"] == "lora"
    ours, average = networks.weights("student"), networks.weights("student_ema")
    assert all(torch.equal(a, b) for a, b in zip(ours, average, strict=True))
    with torch.no_grad():
        for weight in ours:
            weight.add_(1.0)
    networks.update_ema(("student",))
    assert all(torch.allclose(b, a - 0.95, atol=1e-5) for a, b in zip(ours, average, strict=True))
    with pytest.raises(UserError, match=r"roles\.student_ema must be copy like student"):
        assemble(compose("train", [*words, "roles.student_ema=lora"]))  # type: ignore[arg-type]


def test_without_solver_and_average_there_is_the_student_alone() -> None:
    assert set(Consistency.roles(solver=None, target_decay=None)) == {"student"}
    assert set(Consistency.roles(solver=exact_step, target_decay=0.5)) == {"student", "target", "student_ema"}
    with pytest.raises(UserError, match="target_decay"):
        Consistency.roles(solver=None, target_decay=1.0)


def test_a_student_of_all_times_exports_any_number_of_steps(tmp_path: Path) -> None:
    from test_export import tiny  # type: ignore[import-not-found]

    from diffdistill.export import write

    recipe, settings = tiny("consistency")
    generator = recipe.distiller.generator.with_steps(2)  # type: ignore[attr-defined]
    assert generator.times == pytest.approx((20.0, 0.3033), abs=1e-3)
    folder = write(recipe, tmp_path / "two", settings, {}, generator)
    assert json.loads((folder / "call.json").read_text())["call"] == {"timesteps": [24, 0]}
    one = write(recipe, tmp_path / "one", settings, {})
    assert json.loads((one / "call.json").read_text())["call"] == {}


PAIRS = sorted(path.stem for path in (Path(__file__).parents[3] / "configs" / "distiller" / "pairs").glob("*.yaml"))


@pytest.mark.parametrize("name", PAIRS)
def test_every_shipped_law_of_pairs_moves_a_wrong_student_back(name: str) -> None:
    recipe = gauss_recipe("consistency", f"distiller/pairs={name}", "trainer.steps=100")
    place(recipe, 0.4, 1.3)
    for key, (mean, error) in mean_gradient(recipe, repeats=40, size=1024).items():
        total, spread = float(mean.sum()), float(error.square().sum().sqrt())
        assert total > 4 * spread, (key, total, spread)
