"""Where weights lie in memory changes no result, and nothing of it is left in what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from diffdistill.config import compose
from diffdistill.recipe import assemble
from diffdistill.rng import Rng

SMALL = ("trainer.batch_size=4", "evaluation=none", "run_dir=none", "stages={}", "init={}")


def recipe_of(*words: str) -> Any:
    settings = compose("train", [*words, *SMALL])
    return assemble({str(key): settings[key] for key in settings})


def losses_and_gradients(recipe: Any) -> list[torch.Tensor]:
    networks, found = recipe.networks, []
    batch = recipe.data.batch(Rng(1, 0, "data", range(4)), 4, recipe.needs, networks.dtype)
    for phase in recipe.distiller.phases(0):
        networks.train_only(phase.trains)
        loss = phase.loss(batch, Rng(1, 0, phase.name, range(4))).total
        loss.backward()
        found += [loss.detach(), *(w.grad.clone() for role in phase.trains for w in networks.weights(role))]
        networks.zero_grad()
    return found


@pytest.mark.parametrize("words", [(), ("roles.fake_score=lora", "lora.rank=2")], ids=["copies", "lora"])
def test_losses_and_gradients_are_the_same_up_to_rounding(words: tuple[str, ...]) -> None:
    found = losses_and_gradients(recipe_of("experiment=digits_dmd2", "channels_last=true", *words))
    wanted = losses_and_gradients(recipe_of("experiment=digits_dmd2", *words))
    largest = max(float(w.abs().max()) for w in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-4 * largest


def test_every_convolution_has_its_channels_innermost_and_files_have_not(tmp_path: Path) -> None:
    networks = recipe_of("experiment=digits_dmd2", "channels_last=true").networks
    modules = [networks.teacher, *(networks[name].network for name in ("student", "fake_score"))]
    kernels = [w for module in modules for w in module.parameters() if w.ndim == 4 and w.shape[2] > 1]
    assert kernels and all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    assert not any(w.is_contiguous() for w in kernels if w.shape[1] > 1)
    saved = networks.standalone("student").backbone
    saved.save_pretrained(tmp_path)
    read = dict(UNet2DModel.from_pretrained(tmp_path).named_parameters())
    assert all(w.is_contiguous() for w in read.values())
    assert all(torch.equal(read[name], weight) for name, weight in saved.named_parameters())
