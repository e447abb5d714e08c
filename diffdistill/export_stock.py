"""A student of one of diffusers' families: its teacher's own pipeline folder with another model and scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.export_cards import command_of, figures_table, licence_of
from diffdistill.export_check import check_close, made_alone, same_draws
from diffdistill.export_schedulers import Stepped, stepped
from diffdistill.generator import Generator
from diffdistill.latents import Latents
from diffdistill.networks.attention import restore_attention
from diffdistill.networks.families.folder import whole_folder
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.families.words import latent_factors
from diffdistill.networks.files import quiet_libraries
from diffdistill.pipelines import write_contract
from diffdistill.prompts import ToldPrompts
from diffdistill.solvers import OdeSampler, Sampler

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe

TOLERANCE = 1e-4  # of the largest latent


def refusal(recipe: Recipe, sampler: Sampler) -> UserError | None:
    """Why this sampler cannot become a folder of its teacher's pipeline class, or None."""
    network: Stock = recipe.networks["student"].network
    data = recipe.data
    if network.reads_more:
        found = "a model that also reads cond['concat']"
        return UserError("export", "needs a model that a prompt is enough for", found, "Its run holds the weights.")
    if network.grid is None:
        fix = "Its run holds the weights; sample it with run=DIR."
        return UserError("export", "needs a pipeline whose call takes the student's grid", network.model_class, fix)
    if not isinstance(data, ToldPrompts | Latents) or data.pipeline is None or data.examples() is None:
        fix = "Train on data=prompts, or on latents that diffdistill precompute made with captions."
        return UserError("export", "needs prompts to verify the folder with", data.name, fix)
    try:
        stepped(network, sampler, data.pipeline)
    except UserError as error:
        return error
    return None


def write(
    network: Stock,
    recipe: Recipe,
    generator: Generator | OdeSampler,
    folder: Path,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> None:
    """Write the generator's pipeline into `folder` and verify it. network: the student's own, adapters merged."""
    from diffusers import DiffusionPipeline

    source = str(settings["networks"]["path"])
    restore_attention(network.model)
    with quiet_libraries():
        place, student = str(whole_folder(source, ("*",))), {network.part: network.model}
        pipeline = DiffusionPipeline.from_pretrained(place, use_safetensors=True, **student)
    steps = stepped(network, generator, source)
    pipeline.register_modules(scheduler=steps.scheduler)
    with quiet_libraries():
        pipeline.save_pretrained(folder)
    call = call_of(network, recipe, steps, source)
    (folder / "README.md").write_text(readme(recipe, generator, call, source, settings, summary))
    # of a data set that can be measured
    texts = {"prompts": recipe.data.texts} if isinstance(recipe.data, ToldPrompts) and recipe.data.provides else {}
    write_contract(folder, call, generator.nfe, generator.times, **texts)
    verify(folder, network, recipe, generator, steps)


def call_of(network: Stock, recipe: Recipe, steps: Stepped, pipeline: str) -> dict[str, Any]:
    """Keywords of the pipeline's call: steps, no guidance, and the size of the samples in pixels and frames."""
    in_space, in_time = latent_factors(pipeline)
    *rest, height, width = recipe.data.shape
    call = {**steps.call, **network.unguided(), "height": height * in_space, "width": width * in_space}
    return call if len(rest) == 1 else {**call, "num_frames": in_time * (rest[1] - 1) + 1}


def told_data(recipe: Recipe) -> ToldPrompts | Latents:
    """The run's data, which `refusal` found to be text."""
    assert isinstance(recipe.data, ToldPrompts | Latents)
    return recipe.data


def examples_of(recipe: Recipe) -> tuple[list[str], Mapping[str, Tensor]]:
    """Two prompts and what the network is told of them."""
    examples = told_data(recipe).examples()
    assert examples is not None
    return examples


def verify(
    folder: Path, network: Stock, recipe: Recipe, generator: Generator | OdeSampler, steps: Stepped | None = None
) -> float:
    """The folder alone, on two prompts, against the generator: the largest difference of their latents, in shares of
    the largest. Raises UserError above 1e-4."""
    texts, cond = examples_of(recipe)
    steps = steps or stepped(network, generator, str(told_data(recipe).pipeline))
    theirs = network.own_layout(made_alone(folder, {"prompt": texts}, "latent"), recipe.data.shape)
    ours = steps.after * same_draws(recipe, generator, cond, 2, steps.before)
    largest = float(theirs.abs().max())
    return check_close(ours / largest, theirs / largest, TOLERANCE)


def readme(
    recipe: Recipe,
    generator: Generator | OdeSampler,
    call: Mapping[str, Any],
    teacher: str,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> str:
    method = type(recipe.distiller).__name__
    licence = licence_of(teacher)
    if isinstance(generator, OdeSampler):
        title, role = f"{teacher}, trained further", "model"
    else:
        title, role = f"{method} student of {teacher}", "student"
    keywords = "".join(f", {key}={value!r}" for key, value in call.items())
    kind = "text-to-video" if len(recipe.data.shape) == 4 else "text-to-image"
    result = "frames" if kind == "text-to-video" else "images"
    return f"""---
license: {licence}
base_model: {teacher}
library_name: diffusers
tags: [diffdistill, {method.lower()}, few-step, {kind}]
---
# {title}

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
Licence of {teacher}: {licence}. This {role} is derived from it.
"""
