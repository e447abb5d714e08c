"""The worked example of docs/write_a_distiller.md: a method in one file and one config outside the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import composing
import pytest
import torch
from omegaconf import DictConfig
from optimum import gauss_recipe, place

from diffdistill import config_files
from diffdistill.cli import main
from diffdistill.config_check import OWN_PACKAGES
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
CONFIGS = EXAMPLES / "configs"
RUN = ["train", "--config-dir", str(CONFIGS), "distiller=fresh_pairs", "data=gmm2d", "trainer=regression"]


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv(OWN_PACKAGES, "fresh_pairs")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed as under --config-dir."""

    def composed(verb: str, words: Sequence[str]) -> DictConfig:
        return composing.by_hydra(verb, [f"hydra.searchpath=[file://{CONFIGS}]", *words])

    monkeypatch.setattr(config_files, "composed", composed)


def gradient(recipe: Recipe) -> float:
    """Norm of the student's mean gradient over 20 batches of 1,024."""
    (phase,) = recipe.distiller.phases(0)
    recipe.networks.train_only(phase.trains)
    for step in range(20):
        rng = Rng(3, step, phase.name, range(1024))
        batch = recipe.data.batch(Rng(3, step, "data", range(1024)), 1024, recipe.needs, recipe.networks.dtype)
        phase.loss(batch, rng).total.backward()
    weights = list(recipe.networks.weights("student"))
    assert all(weight.grad is not None for weight in weights)
    return float(torch.cat([weight.grad.flatten() for weight in weights]).norm()) / 20  # type: ignore[union-attr]


@pytest.mark.usefixtures("found")
def test_at_the_exact_map_its_gradient_falls_with_the_teachers_steps() -> None:
    """A Gaussian's map is known: what is left is the error of K Heun steps, 4 times less when they double."""
    norms = []
    for num_steps in (10, 20, 40):
        recipe = gauss_recipe("fresh_pairs", f"distiller.num_steps={num_steps}")
        place(recipe)
        norms.append(gradient(recipe))
    assert norms[0] > 3.5 * norms[1] > 3.5**2 * norms[2] > 0, norms


@pytest.mark.usefixtures("found")
def test_away_from_it_the_gradient_is_that_of_the_squared_distance() -> None:
    """Both maps take x_t to m + (x_t - m) r with r = q(t_min) / q(t_max), q(t)^2 = s^2 + t^2, under EDM. Where the
    student's m is off by .3 in each of 6 coordinates, so is its sample by .3 (1 - r): the gradient is .1 (1 - r)^2."""
    recipe = gauss_recipe("fresh_pairs", "distiller.num_steps=40")
    law = place(recipe, mean_off=0.3)
    gradient(recipe)
    student = recipe.networks["student"]
    low, high = ((law["std"] ** 2 + t**2).sqrt() for t in (student.process.t_min, student.process.t_max))
    found = student.network.mean.grad / 20  # type: ignore[union-attr]
    assert torch.allclose(found, 0.1 * (1 - low / high) ** 2, rtol=0.02), found


def test_the_command_line_trains_it_and_samples_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*RUN, "trainer.steps=5", "evaluation=none", f"run_dir={run}"]) == 0
    words = ["sample", f"run={run}", "num=4", f"out={tmp_path / 'grid.png'}"]
    assert main(words) == 0 and (tmp_path / "grid.png").exists()
    monkeypatch.delenv(OWN_PACKAGES)
    capsys.readouterr()
    assert main(words) == 2
    assert f"{OWN_PACKAGES}=NAME in the environment adds your own." in capsys.readouterr().err


def test_a_mistake_in_it_is_told_as_in_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "distiller.num_steps=0", "dry_run=true", "run_dir=none"]) == 2
    assert "num_steps must lie in 1..10000, got 0." in capsys.readouterr().err
    assert main([*RUN, "distiller.num_steps=1.5", "dry_run=true", "run_dir=none"]) == 2
    assert "distiller.num_steps must be an integer, got 1.5." in capsys.readouterr().err


def test_what_data_of_ones_own_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_data.py").write_text(
        "class Half:\n"
        "    def __init__(self, num_modes, radius, std, unconditional): ...\n"
        "    name, shape, provides, num_classes = 'half', (2,), frozenset({'x0'}), 8\n"
        "    def batch(self, rng, global_batch, needs, dtype): ...\n"
        "    def reference(self): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(OWN_PACKAGES, "half_data")
    words = ["experiment=gmm2d_kd", "data._target_=half_data.Half", "dry_run=true", "run_dir=none"]
    assert main(["train", *words]) == 2
    told = capsys.readouterr().err
    assert "got a node with _target_ half_data.Half, which has no conditions, no features." in told, told
