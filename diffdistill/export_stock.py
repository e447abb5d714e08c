"""A student of one of diffusers' families: its teacher's own pipeline folder with another model and scheduler.

Flows are stepped by FlowMatchEulerDiscreteScheduler at the student's own sigmas; variance preserving processes by
EulerDiscreteScheduler at its own timesteps, which begins with as much noise as the process holds at t_max. Both are
DDIM, so a student of several steps has to re-noise that way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdistill import wan_parts
from diffdistill.denoiser import Denoiser, FlowMap
from diffdistill.errors import UserError
from diffdistill.export_cards import command_of, figures_table, licence_of
from diffdistill.export_check import check_close, made_alone, same_draws
from diffdistill.generator import Generator, ddim
from diffdistill.networks.attention import restore_attention
from diffdistill.networks.families.folder import whole_folder
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.families.words import factors_of
from diffdistill.networks.files import quiet_libraries
from diffdistill.pipelines import write_contract
from diffdistill.process import EPS, VP, X0, RectifiedFlow, V
from diffdistill.prompts import ToldPrompts
from diffdistill.solvers import Sampler

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe

TOLERANCE = 1e-4  # of the largest latent
TIME_TOLERANCE = 1e-5


def refusal(recipe: Recipe, sampler: Sampler) -> UserError | None:
    """Why this sampler cannot become a folder of its teacher's pipeline class, or None."""
    network: Stock = recipe.networks["student"].network
    if network.grid is None:
        fix = "Its run holds the weights; sample it with run=DIR."
        return UserError("export", "needs a pipeline whose call takes the student's grid", network.model_class, fix)
    if not isinstance(recipe.data, ToldPrompts):
        fix = "Train on data=prompts."
        return UserError("export", "needs prompts to verify the folder with", recipe.data.name, fix)
    if not isinstance(sampler, Generator):
        return UserError("export", "needs a student of few steps", type(sampler).__name__, "Keep the run.")
    several = len(sampler.times) > 1
    if not isinstance(sampler.student, Denoiser if several else Denoiser | FlowMap):
        found = type(sampler.student).__name__
        return UserError("export", "needs a student that predicts as its teacher does", found, "Keep the run.")
    if several and sampler.renoise is not ddim:
        name = str(getattr(sampler.renoise, "__name__", sampler.renoise))
        fix = "Set it, or use one step."
        return UserError("distiller.renoise", "must be ddim, as stock schedulers step", name, fix)
    if sampler.prior_std is not None:
        fix = "The scheduler begins with the process's own noise."
        return UserError("prior_std", "must be null", sampler.prior_std, fix)
    if network.reads_more:
        found = "a model that also reads cond['concat']"
        return UserError("export", "needs a model that a prompt is enough for", found, "Its run holds the weights.")
    try:
        scheduler_of(network, sampler.times)
    except UserError as error:
        return error
    return None


def scheduler_of(network: Stock, times: tuple[float, ...]) -> tuple[Any, dict[str, Any]]:
    """The scheduler that calls the model at `times`, and the keywords of the pipeline's call that make it.

    Raises UserError where the pipeline cannot be told the times.
    """
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    call: dict[str, Any] = {"num_inference_steps": len(times)}
    process = network.process
    if isinstance(process, RectifiedFlow) and network.grid == "sigmas":
        return FlowMatchEulerDiscreteScheduler(), {**call, "sigmas": list(times)}
    if isinstance(process, RectifiedFlow) and network.grid == "":
        scheduler = wan_parts.scheduler(times)
        scheduler.set_timesteps(len(times))
        _check(times, scheduler.sigmas.tolist(), "a grid of FlowMatchEulerDiscreteScheduler")
        return scheduler, call
    if not isinstance(process, VP) or process.zero_terminal_snr or process.snr_shift != 1 or network.grid is None:
        fix = "Its run holds the weights."
        raise UserError("export", "needs a noise process that stock schedulers step here", process, fix)
    if not all(float(time).is_integer() for time in times) or network.grid != "timesteps":
        raise UserError("distiller.times", "must be whole timesteps, which the pipeline is told", times, "Round them.")
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=process.num_steps,
        beta_start=process.beta_start,
        beta_end=process.beta_end,
        beta_schedule=process.schedule,
        prediction_type=_KINDS[network.kind],
        timestep_spacing="trailing",
    )
    return scheduler, {**call, "timesteps": [int(time) for time in times]}


_KINDS = {EPS: "epsilon", V: "v_prediction", X0: "sample"}


def _check(times: tuple[float, ...], legal: list[float], what: str) -> None:
    for time, nearest in zip(times, legal, strict=False):
        if not abs(time - nearest) <= TIME_TOLERANCE * max(1.0, abs(nearest)):
            raise UserError("distiller.times", f"must lie on {what}", time, f"The nearest is {nearest:.8g}.")


def write(
    network: Stock,
    recipe: Recipe,
    generator: Generator,
    folder: Path,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> None:
    """Write the generator's pipeline into `folder` and verify it. network: the student's own, adapters merged."""
    from diffusers import DiffusionPipeline

    source = str(settings["networks"]["path"])
    restore_attention(network.model)
    with quiet_libraries():
        pipeline = DiffusionPipeline.from_pretrained(str(whole_folder(source, ("*",))), **{network.part: network.model})
    scheduler, call = scheduler_of(network, generator.times)
    pipeline.register_modules(scheduler=scheduler)
    with quiet_libraries():
        pipeline.save_pretrained(folder)
    call |= {**network.unguided(), **_size(recipe, folder)}
    (folder / "README.md").write_text(readme(recipe, generator, call, source, settings, summary))
    write_contract(folder, call, generator.nfe, generator.times)
    verify(folder, network, recipe, generator)


def _size(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Keywords for the size of the samples, in pixels and frames."""
    file = folder / "vae" / "config.json"
    in_space, in_time = factors_of(json.loads(file.read_text())) if file.is_file() else (1, 1)
    *rest, height, width = recipe.data.shape
    size = {"height": height * in_space, "width": width * in_space}
    return size if len(rest) == 1 else {**size, "num_frames": in_time * (rest[1] - 1) + 1}


def verify(folder: Path, network: Stock, recipe: Recipe, generator: Generator) -> float:
    """The folder alone, on two prompts, against the generator: the largest difference of their latents, in shares of
    the largest. Raises UserError above 1e-4."""
    data = recipe.data
    assert isinstance(data, ToldPrompts)
    texts = [data.texts[0], data.texts[-1]]
    cond = {key: value[[0, len(data.texts) - 1]] for key, value in data.cond.items()}
    theirs = network.own_layout(made_alone(folder, {"prompt": texts}, "latent"), data.shape)
    ours = same_draws(recipe, generator, cond, 2)
    largest = float(theirs.abs().max())
    return check_close(ours / largest, theirs / largest, TOLERANCE)


def readme(
    recipe: Recipe,
    generator: Generator,
    call: Mapping[str, Any],
    teacher: str,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> str:
    method = type(recipe.distiller).__name__
    licence = licence_of(teacher)
    keywords = "".join(f", {key}={value!r}" for key, value in call.items())
    kind = "text-to-video" if len(recipe.data.shape) == 4 else "text-to-image"
    result = "frames" if kind == "text-to-video" else "images"
    return f"""---
license: {licence}
base_model: {teacher}
library_name: diffusers
tags: [diffdistill, {method.lower()}, few-step, {kind}]
---
# {method} student of {teacher}

{generator.nfe} network evaluation(s) per sample, no guidance. Load it with diffusers alone:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
{result} = pipeline("a prompt"{keywords}).{result}
```

`call.json` holds the keyword arguments of that call and the hashes of the files. The folder was verified when it was
written: a fresh process without diffdistill gave the training code's latents within {TOLERANCE:g} of the largest.

Made by `{command_of(settings)}`.

{figures_table(summary)}
Licence of the teacher: {licence}. The student is derived from it.
"""
