"""Stock schedulers against this package's samplers, in stock pipelines, on one noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_prompts import TEXTS, settings
from tiny_pipelines import written

from diffdistill.denoiser import FlowMap, Guidance
from diffdistill.errors import UserError
from diffdistill.export_check import same_draws
from diffdistill.export_schedulers import stepped
from diffdistill.generator import Generator, ddim, fresh, fresh_from_t_min
from diffdistill.networks.files import quiet_libraries
from diffdistill.process import VP, V
from diffdistill.recipe import Recipe, assemble


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedulers")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    return folder


@pytest.fixture(scope="module", params=["sd15", "sd21", "flux"])
def recipe(request: pytest.FixtureRequest, place: Path) -> Recipe:
    """Of a tiny pipeline, its student away from its teacher."""
    name = request.param
    folder = written(name, place / name)
    family = "flux" if name == "flux" else "sd15"
    words = ("distiller=dmd", "distiller.regression_weight=0", "data.size=[16,16]")
    made = assemble(settings(family, folder, place / "prompts.txt", *words))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in made.networks.weights("student"):
            weight.add_(0.02 * torch.randn_like(weight))
    return made


def differing(recipe: Recipe, sampler: Any) -> tuple[str, float]:
    """The scheduler, and by which share of the largest latent the stock pipeline and the sampler differ."""
    network: Any = recipe.networks["student"].network
    data: Any = recipe.data
    steps = stepped(network, sampler, data.pipeline)
    with quiet_libraries():
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
            data.pipeline, **{network.part: network.model}, scheduler=steps.scheduler
        )
        pipeline.set_progress_bar_config(disable=True)
        texts, cond = data.examples()
        call = {**steps.call, **network.unguided(), "height": 16, "width": 16}
        theirs = pipeline(texts, **call, generator=torch.Generator().manual_seed(0), output_type="latent").images
    theirs = network.own_layout(theirs, data.shape)
    ours = steps.after * same_draws(recipe, sampler, cond, 2, steps.before)
    return type(steps.scheduler).__name__, float((ours - theirs).abs().max() / theirs.abs().max())


def generators(recipe: Recipe) -> dict[str, tuple[Generator, str]]:
    """Samplers of the student with the scheduler that steps them."""
    student, process = recipe.networks["student"], recipe.networks["student"].process
    several = (999.0, 599.0, 199.0) if isinstance(process, VP) else (1.0, 0.7, 0.2)
    first = several[:1]
    if not isinstance(process, VP):
        name = "FlowMatchEulerDiscreteScheduler"
        one = Generator(FlowMap(student, "consistency"), first)
        return {"one": (one, name), "ddim": (Generator(student, several, ddim), name)}
    chosen = FlowMap(student, "consistency")
    return {
        "one": (Generator(student, first), "EulerDiscreteScheduler"),
        "ddim": (Generator(student, several, ddim), "EulerDiscreteScheduler"),
        "one from unit noise": (Generator(student, (399.0,), prior_std=1.0), "LCMScheduler"),
        "fresh": (Generator(student, several, fresh, 1.0), "LCMScheduler"),
        "map": (Generator(chosen, first), "EulerDiscreteScheduler"),
        "fresh map": (Generator(chosen, several, fresh_from_t_min, 1.0), "TCDScheduler"),
    }


def test_a_student_s_steps_are_a_stock_scheduler_s(recipe: Recipe) -> None:
    found = {name: differing(recipe, sampler) for name, (sampler, _) in generators(recipe).items()}
    assert {name: scheduler for name, (scheduler, _) in found.items()} == {
        name: scheduler for name, (_, scheduler) in generators(recipe).items()
    }
    assert max(difference for _, difference in found.values()) < 1e-4, found


def test_zero_terminal_snr_is_lcm_s(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Euler's scheduler has no finite noise level there; a prediction of v begins from unit noise."""
    network: Any = recipe.networks["student"].network
    if network.kind != V:
        pytest.skip("only a prediction of v is defined there")
    monkeypatch.setattr(network, "process", replace(network.process, zero_terminal_snr=True))
    student = recipe.networks["student"]
    name, difference = differing(recipe, Generator(student, (999.0, 599.0), fresh, 1.0))
    assert name == "LCMScheduler" and difference < 1e-4
    with pytest.raises(UserError, match="EulerDiscreteScheduler steps"):
        differing(recipe, Generator(student, (999.0,)))


def test_a_model_of_many_steps_keeps_its_scheduler(recipe: Recipe) -> None:
    sampler = replace(recipe.sampler.with_steps(10), denoiser=recipe.networks["student"])
    assert differing(recipe, sampler)[1] < 1e-4


def test_what_no_scheduler_steps_is_told(recipe: Recipe) -> None:
    network: Any = recipe.networks["student"].network
    student, data = recipe.networks["student"], recipe.data
    one = Generator(student, (recipe.networks["student"].process.t_max,))
    wrong = [(replace(one, prior_std=2.0), "distiller.prior_std")]
    if isinstance(network.process, VP):
        several = Generator(FlowMap(student, "consistency"), (999.0, 199.0), fresh_from_t_min)
        wrong += [
            (several, "export"),
            (Generator(student, (999.0, 199.0), fresh), "distiller.renoise"),
            (Generator(student, (700.5,)), "distiller.times"),
        ]
    else:
        wrong.append((Generator(student, (1.0, 0.5), fresh), "distiller.renoise"))
    for sampler, key in wrong:
        with pytest.raises(UserError) as told:
            stepped(network, sampler, data.pipeline)  # type: ignore[attr-defined]
        assert told.value.key == key
    guided = replace(recipe.sampler, denoiser=student.guided(Guidance(3.0, recipe.networks.teacher.null)))
    with pytest.raises(UserError, match="without guidance"):
        stepped(network, guided, data.pipeline)  # type: ignore[attr-defined]
