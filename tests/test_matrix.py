"""Every distiller config on every family's real classes, tiny and random: two steps, gradients on the right roles,
saved, read back, sampled.

By default each distiller runs on one family and each family with one distiller; `make matrix` runs all. A new config or
family enrols itself, and no pair is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from optimum import joined
from tiny_families import TINY
from torch import Tensor

from diffdistill import checkpoint
from diffdistill.config import build, compose
from diffdistill.latents import Latents, write
from diffdistill.networks.roles import Networks
from diffdistill.networks.scheduled import schedule_of
from diffdistill.process import VP, RectifiedFlow
from diffdistill.recipe import Recipe, assemble_parts
from diffdistill.rng import Rng
from diffdistill.trainer import Trainer
from diffdistill.training_state import TrainingState

DISTILLERS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / "distiller").glob("*.yaml"))
FAMILIES = sorted(TINY)
BATCH = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unit noise in place of each family's latents, with the conditions it takes."""
    place = tmp_path_factory.mktemp("latents")
    source = torch.Generator().manual_seed(0)
    for name, tiny in TINY.items():
        null = None if "label" in tiny.cond else tiny.conditions(1, seed=9)
        write(place / name, torch.randn(16, *tiny.shape, generator=source), tiny.conditions(16), null, "nowhere")
    return {name: place / name for name in TINY}


def settings_of(distiller: str, family: str) -> Any:
    name = "sd15" if family == "sd21" else family
    words = [f"distiller={distiller}", f"networks={name}", "networks.path=none", "data=gmm2d", "experiment=none",
             "evaluation=none", "run_dir=none", "sampler.num_steps=2", "trainer.steps=2", "precision=fp32",
             f"trainer.batch_size={BATCH}", "lora.rank=2", *OWN.get(distiller, [])]  # fmt: skip
    process = schedule_of(TINY[family].scheduler_config).process
    flow = isinstance(process, RectifiedFlow) or (isinstance(process, VP) and process.zero_terminal_snr)
    return compose("train", [*words, *(flow_laws(compose("train", words).distiller) if flow else ())])


# of the trainer or the method's own schedule, where two steps are too few
OWN: dict[str, list[str]] = {"progressive": ["trainer.steps=100"]}
UNIFORM = "{_target_: diffdistill.times.UniformTime, low: 0.02, high: 0.98}"


def flow_laws(node: Any, path: str = "distiller") -> Iterator[str]:
    """Overrides that replace EDM's laws of time, for processes that end without signal: their ratio is not bounded."""
    for key, value in node.items():
        if not hasattr(value, "items"):
            continue
        if str(value.get("_target_", "")).startswith("diffdistill.times.Karras"):
            yield f"{path}.{key}={UNIFORM}"
        else:
            yield from flow_laws(value, f"{path}.{key}")


def recipe_of(distiller: str, family: str, folder: Path) -> Recipe:
    data = Latents(str(folder), num_classes=TINY[family].cond.get("label", (0,))[0])
    return joined(assemble_parts(settings_of(distiller, family), data, TINY[family].network()), BATCH)


def pairs() -> Iterator[Any]:
    for d, distiller in enumerate(DISTILLERS):
        for f, family in enumerate(FAMILIES):
            default = (d - f) % max(len(DISTILLERS), len(FAMILIES)) == 0 or f == d % len(FAMILIES)
            marks = [] if default else [pytest.mark.matrix]
            yield pytest.param(distiller, family, id=f"{distiller}-{family}", marks=marks)


@pytest.mark.parametrize(("distiller", "family"), pairs())
def test_matrix(distiller: str, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(distiller, family, folders[family])
    trainer: Trainer = build(settings_of(distiller, family).trainer)
    state = trainer.start(recipe.distiller, recipe.networks)
    accelerator = Accelerator(cpu=True)
    for step in range(2):
        batches = trainer.batches(recipe.data, recipe.needs, recipe.networks, step)
        for phase in recipe.distiller.phases(step):
            before = {role: _copy(recipe.networks, role) for role in recipe.networks.owned}
            trainer.update(phase, batches, step, recipe.networks, state.optimizers, accelerator)
            moved = {role for role in recipe.networks.owned if _moved(recipe.networks, role, before[role])}
            followers = {r for r, role in recipe.networks.roles.items() if role.ema_of in phase.trains}
            assert set(phase.trains) <= moved <= set(phase.trains) | followers, phase.name
        recipe.networks.train_only(())
        state.step = step + 1
    checkpoint.commit(tmp_path, state.step, state.tensors(), state.values())
    again = recipe_of(distiller, family, folders[family])
    restored: TrainingState = trainer.start(again.distiller, again.networks)
    restored.load(checkpoint.verified(tmp_path / "step-00000002"))
    again.distiller.phases(1)  # what a resumed run asks first
    drawn = [_samples(one) for one in (recipe, again)]
    assert torch.equal(*drawn) and drawn[0].isfinite().all()
    assert drawn[0].shape == (2, *recipe.data.shape)


def _copy(networks: Networks, role: str) -> list[Tensor]:
    return [weight.detach().clone() for weight in networks.weights(role)]


def _moved(networks: Networks, role: str, before: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, networks.weights(role), strict=True))


@torch.no_grad()
def _samples(recipe: Recipe) -> Tensor:
    rng = Rng(0, 0, "samples", range(2))
    z = rng.normal((2, *recipe.data.shape), torch.float32)
    return recipe.distiller.generator.sample(z, recipe.data.conditions(rng), rng)
