"""Gradient checkpointing and roles over one frozen backbone: the same gradients, and what they cost in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_families import TINY, UNET

from diffdistill.config import compose
from diffdistill.errors import UserError
from diffdistill.latents import write
from diffdistill.memory import PeakBytes, optimizer_tensors
from diffdistill.networks.families.stable_diffusion import StableDiffusion
from diffdistill.networks.files import seeded
from diffdistill.networks.scheduled import schedule_of
from diffdistill.recipe import Recipe, assemble_parts
from diffdistill.rng import Rng

SIZE = 16  # of latents
SMALL, MIDDLE = (32, 64), (160, 320)  # widths of blocks: the middle one has 27 M parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("latents") / "set"
    source = torch.Generator().manual_seed(0)
    tiny = TINY["sd15"]
    x = torch.randn(16, 4, SIZE, SIZE, generator=source)
    write(place, x, tiny.conditions(16), tiny.conditions(1), "nowhere")
    return place


def recipe_of(folder: Path, *words: str, widths: tuple[int, ...] = SMALL) -> Recipe:
    from diffdistill.config import build

    base = ["data=latents", f"data.path={folder}", "networks=sd15", "networks.path=nowhere", "experiment=none"]
    settings: Any = compose("train", [*base, "evaluation=none", "run_dir=none", "precision=fp32", *words])
    with seeded(0):
        model = UNet2DConditionModel.from_config({**UNET, "block_out_channels": widths, "layers_per_block": 2})
    teacher = StableDiffusion(model, schedule_of(TINY["sd15"].scheduler_config), 1.0)
    return assemble_parts(settings, build(settings["data"]), teacher)


def one_step(recipe: Recipe, batch: int, optimizers: dict[str, torch.optim.Optimizer] | None = None) -> None:
    """Every phase of a step, with its update."""
    for phase in recipe.distiller.phases(0):
        recipe.networks.train_only(phase.trains)
        data = recipe.data.batch(Rng(0, 0, "data", range(batch)), batch, recipe.needs, torch.float32)
        phase.loss(data, Rng(0, 0, phase.name, range(batch))).total.backward()
        for role in phase.trains:
            if optimizers is not None:
                optimizers[role].step()
        if optimizers is not None:
            recipe.networks.zero_grad()


GAN = ("distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1")


@pytest.mark.parametrize(
    "words",
    [("distiller=dmd2", *GAN), ("distiller=dmd2", *GAN, "roles.student=lora", "roles.fake_score=lora"),
     ("distiller=scm", "roles.student=lora")],
    ids=["copies", "lora", "scm-lora"],
)  # fmt: skip
def test_gradients_are_the_same(words: tuple[str, ...], folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        recipe = recipe_of(folder, *words, f"checkpointing={checkpointing}")
        torch.manual_seed(0)
        with torch.no_grad():
            for role in recipe.networks.trainable:
                for weight in recipe.networks.weights(role):
                    weight.add_(0.02 * torch.randn_like(weight))
        gradients = {}
        for phase in recipe.distiller.phases(0):
            recipe.networks.train_only(phase.trains)
            data = recipe.data.batch(Rng(0, 0, "data", range(2)), 2, recipe.needs, torch.float32)
            phase.loss(data, Rng(0, 0, phase.name, range(2))).total.backward()
            for role in phase.trains:
                parts = [w.grad.flatten() for w in recipe.networks.weights(role) if w.grad is not None]
                gradients[f"{phase.name}/{role}"] = torch.cat(parts)
            recipe.networks.zero_grad()
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def peak(folder: Path, *words: str, batch: int = 2, widths: tuple[int, ...] = SMALL) -> int:
    """Live tensor bytes at most within a second step, optimizers' states included."""
    recipe = recipe_of(folder, *words, "roles.student=lora", "lora.rank=8", widths=widths)
    networks = recipe.networks
    optimizers: dict[str, torch.optim.Optimizer] = {
        role: torch.optim.AdamW(list(networks.weights(role)), lr=1e-4) for role in networks.trainable
    }
    one_step(recipe, batch, optimizers)
    networks.zero_grad()
    live = {id(w): w for role in networks.trainable for w in networks.weights(role)}
    live |= {id(w): w for w in networks.teacher.parameters()}
    with PeakBytes([*live.values(), *optimizer_tensors(optimizers.values())]) as counter:
        one_step(recipe, batch, optimizers)
    return counter.peak


def test_checkpointing_saves_memory(folder: Path) -> None:
    plain = peak(folder, "distiller=denoising", batch=8)
    assert peak(folder, "distiller=denoising", "checkpointing=true", batch=8) < 0.75 * plain


def test_roles_over_one_backbone_cost_little_more_than_fine_tuning(folder: Path) -> None:
    """dmd2 holds student, fake score and teacher; a plain LoRA fine-tuning holds one of them."""
    fine_tuning = peak(folder, "distiller=denoising", "checkpointing=true", widths=MIDDLE)
    words = ("distiller=dmd2", "roles.fake_score=lora", "checkpointing=true")
    plain, gan = (peak(folder, *words, *more, widths=MIDDLE) / fine_tuning for more in ((), GAN))
    print(f"peak bytes of dmd2 over LoRA fine-tuning: {plain:.3f}, with a GAN {gan:.3f}")
    assert plain <= 1.15 and gan <= 1.25


def test_base_weights_exist_once(folder: Path) -> None:
    recipe = recipe_of(folder, "distiller=dmd2", "roles.student=lora", "roles.fake_score=lora", "lora.rank=2")
    backbone = {w.untyped_storage().data_ptr() for w in recipe.networks.teacher.parameters()}
    networks = [recipe.networks[role].network for role in ("student", "fake_score", "target")]
    assert all(network is recipe.networks.teacher for network in networks)
    weights = [w for role in recipe.networks.trainable for w in recipe.networks.weights(role)]
    assert {w.untyped_storage().data_ptr() for w in weights} <= backbone  # adapters lie in it, nothing else was made
    frozen = sum(w.numel() for w in recipe.networks.bare().parameters())
    assert sum(w.numel() for w in recipe.networks.teacher.parameters()) < 1.5 * frozen


def test_a_network_without_is_refused() -> None:
    from diffdistill.recipe import assemble

    words = ["data=gmm2d", "experiment=none", "evaluation=none", "run_dir=none", "checkpointing=true"]
    with pytest.raises(UserError, match="checkpointing needs a diffusers model"):
        assemble(compose("train", words))  # type: ignore[arg-type]
