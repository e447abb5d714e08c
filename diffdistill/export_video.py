"""A video student as a stock WanPipeline folder: the teacher's own parts around the student's transformer.

The folder runs dense attention, for stock diffusers knows no other; its card shows how a sparse student's masks come
back. It is compared both ways before anything is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from diffdistill import wan_parts
from diffdistill.config import build
from diffdistill.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.export_cards import command_of, figures_table, licence_of, write_card
from diffdistill.export_check import check_close, made_alone, same_draws
from diffdistill.export_schedulers import flow_scheduler
from diffdistill.generator import Generator, ddim
from diffdistill.moving_digits import prompts
from diffdistill.networks.attention import restore_attention, set_attention
from diffdistill.networks.files import quiet_libraries, resolve
from diffdistill.networks.wan import PROMPTS, Wan
from diffdistill.pipelines import CALL, write_contract
from diffdistill.solvers import Sampler

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe

TIME_TOLERANCE = 1e-5
TOLERANCE = 1e-4  # on [0, 1], behind a VAE that is the identity within 1e-5


def refusal(recipe: Recipe, sampler: Sampler) -> UserError | None:
    """Why this sampler of a Wan network cannot become a WanPipeline folder, or None."""
    if isinstance(sampler, Generator):
        if len(sampler.times) > 1 and sampler.renoise is not ddim:
            found = getattr(sampler.renoise, "__name__", sampler.renoise)
            return UserError("distiller.renoise", "must be ddim, as a flow scheduler steps", found, "Set it.")
        if not isinstance(sampler.student, Denoiser):
            found = type(sampler.student).__name__
            return UserError("export", "needs a student that predicts as its teacher does", found, "Keep the run.")
        if sampler.prior_std not in (None, 1.0):
            return UserError("prior_std", "must be 1", sampler.prior_std, "WanPipeline draws unit noise.")
    try:
        check_grid(sampler_times(sampler))
    except UserError as error:
        return error
    return None


def sampler_times(sampler: Any) -> tuple[float, ...]:
    """The times at which a sampler calls its network."""
    return sampler.times if isinstance(sampler, Generator) else sampler.times[:-1]


def check_grid(times: tuple[float, ...]) -> None:
    """Refuse times that the exported scheduler does not call at, naming the nearest that it does."""
    scheduler = flow_scheduler(times)
    scheduler.set_timesteps(len(times))
    for time, legal in zip(times, scheduler.sigmas.tolist(), strict=False):
        if not abs(time - legal) <= TIME_TOLERANCE:
            constraint = "must lie on a grid of FlowMatchEulerDiscreteScheduler, which solvers.flow_shift makes"
            raise UserError("distiller.times", constraint, time, f"The nearest is {legal:.8g}.")


def call_of(recipe: Recipe, sampler: Sampler, folder: Path) -> dict[str, Any]:
    """Keyword arguments that make the call of the pipeline in `folder` the sampler's."""
    vae = json.loads((folder / "vae" / "config.json").read_text())
    in_time, in_space = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    _, frames, height, width = recipe.data.shape
    return {
        "height": height * in_space,
        "width": width * in_space,
        # WanPipeline rounds to a multiple of the VAE's factor and adds one: for a factor of 1 it always adds one
        "num_frames": in_time * (frames - 1) + (in_time > 1),
        "num_inference_steps": len(sampler_times(sampler)),
        "guidance_scale": 1.0,
        "max_sequence_length": recipe.networks.teacher.prompts.shape[1],
    }


def write_parts(network: Wan, sampler: Sampler, folder: Path, settings: Mapping[str, Any]) -> None:
    """The pipeline's folder with `network`'s transformer, without card and call.json.

    Tokenizer, text encoder and VAE are the teacher's; a network trained from random weights gets those its prompts
    were embedded with.
    """
    from diffusers import WanPipeline

    times = sampler_times(sampler)
    transformer = plain(network).transformer
    path = settings["networks"].get("path")
    if path is None:
        pipeline = wan_parts.pipeline(transformer, times)
    else:
        scheduler = flow_scheduler(times)
        with quiet_libraries():
            pipeline = WanPipeline.from_pretrained(
                str(resolve(path)), use_safetensors=True, transformer=transformer, scheduler=scheduler
            )
    with quiet_libraries():
        pipeline.save_pretrained(folder)
    if path is None:
        wan_parts.write_prompts(folder)
    else:
        shutil.copy(Path(resolve(path)) / PROMPTS, folder / PROMPTS)


def plain(network: Wan) -> Wan:
    """The network with stock attention; changed in place."""
    restore_attention(network.transformer)
    return network


def dense_generator(network: Wan, generator: Generator) -> Generator:
    """The generator on a network of its own, outside every role, with stock attention."""
    return replace(generator, student=Denoiser(plain(network), "exported"))


def masked(settings: Mapping[str, Any], folder: Path) -> Any:
    """The written pipeline with the student's masks set again, as its card shows."""
    from diffusers import WanPipeline

    with quiet_libraries():
        pipeline = WanPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    set_attention(pipeline.transformer, build(settings["attention"]["student"]), roles=None)
    return pipeline


def attention_of(settings: Mapping[str, Any]) -> Any:
    """The configuration of the student's attention as plain values, None where it is stock."""
    node = (settings.get("attention") or {}).get("student")
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def attention_lines(settings: Mapping[str, Any]) -> str:
    """How the student's masks come back, in Markdown; empty for a dense student."""
    node = attention_of(settings)
    if node is None:
        return ""
    names = ["diffdistill.networks.attention.set_attention", *_targets(node)]
    imports = "\n".join("from {} import {}".format(*name.rpartition(".")[::2]) for name in names)
    return f"""It was trained with block-sparse attention; the stock pipeline runs it densely, which gives other
samples. With diffdistill installed the masks come back:

```python
{imports}

attention = {_call(node)}
set_attention(pipeline.transformer, attention, roles=None)
```
"""


def _targets(node: Any) -> list[str]:
    """The classes that a configuration node builds, by full name, each once."""
    if not isinstance(node, dict):
        return []
    inner = [name for value in node.values() for name in _targets(value)]
    return list(dict.fromkeys([str(node["_target_"]), *inner]))


def _call(node: Any) -> str:
    """A configuration node as the Python that builds the same."""
    if not isinstance(node, dict):
        return repr(node)
    name = str(node["_target_"]).rpartition(".")[2]
    words = ", ".join(f"{key}={_call(value)}" for key, value in node.items() if not str(key).startswith("_"))
    return f"{name}({words})"


def inputs_of(labels: torch.Tensor) -> dict[str, Any]:
    """The pipeline's inputs for classes."""
    told = prompts()
    return {"prompt": [told[int(label)] for label in labels]}


def verify(folder: Path, network: Wan, recipe: Recipe, generator: Generator, settings: Mapping[str, Any]) -> float:
    """The folder alone against `network`, the student's, with stock attention; and, where the student has masks, with
    them against the student itself. Returns the largest difference.

    Raises UserError where either differs by more than 1e-4 on [0, 1].
    """
    labels = torch.arange(2) * 41 % recipe.data.num_classes
    inputs, cond = inputs_of(labels), {"label": labels}
    dense = dense_generator(network, generator)
    frames = made_alone(folder, inputs).transpose(1, 2)  # [B, C, T, H, W], its three channels equal
    found = check_close(same_draws(recipe, dense, cond, 2).clamp(-1, 1) / 2 + 0.5, frames[:, :1], TOLERANCE)
    if attention_of(settings) is not None:
        pipeline = masked(settings, folder)
        call = json.loads((folder / CALL).read_text())["call"]
        made = pipeline(**inputs, **call, generator=torch.Generator().manual_seed(0), output_type="pt").frames
        ours = same_draws(recipe, generator, cond, 2).clamp(-1, 1) / 2 + 0.5
        found = max(found, check_close(ours, torch.as_tensor(made).transpose(1, 2)[:, :1], TOLERANCE))
    return found


def write(
    network: Wan,
    recipe: Recipe,
    sampler: Sampler,
    folder: Path,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> None:
    """Write the sampler's pipeline into `folder` and verify a student's. network: its own, adapters merged."""
    write_parts(network, sampler, folder, settings)
    call = call_of(recipe, sampler, folder)
    (folder / "README.md").write_text(video_readme(recipe, sampler, call, settings, summary))
    more = {"prompts": prompts(), "attention": attention_of(settings)}
    write_contract(folder, call, sampler.nfe, sampler_times(sampler), **more)
    if isinstance(sampler, Generator):
        verify(folder, network, recipe, sampler, settings)
    write_card(folder, next((folder / "transformer").glob("*.safetensors")), settings, summary)


def video_readme(
    recipe: Recipe, sampler: Sampler, call: Mapping[str, Any], settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    teacher = settings["networks"].get("path")
    method = type(recipe.distiller).__name__
    licence = recipe.data.source.licence if teacher is None else licence_of(str(teacher))
    base = "" if teacher is None else f"base_model: {teacher}\n"
    keywords = "".join(f", {key}={value}" for key, value in call.items())
    what = f"Denoiser of {recipe.data.name}"
    if isinstance(sampler, Generator):
        what = f"{method} student of {teacher}" if teacher else f"{method} student on {recipe.data.name}"
    return f"""---
license: {licence}
{base}library_name: diffusers
tags: [diffdistill, {method.lower()}, text-to-video]
---
# {what}

{sampler.nfe} network evaluations per clip, no guidance. Load it with diffusers alone:

```python
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("this folder")
frames = pipeline("digit 3 moving up and right"{keywords}).frames
```

The VAE is the identity and the text encoder random: both were built for these prompts, which `call.json` lists with
the keyword arguments of the call. `prompts.safetensors` holds their embeddings for training.

{attention_lines(settings) if isinstance(sampler, Generator) else ""}
Made by `{command_of(settings)}`. Training data: {recipe.data.source.description}.

{figures_table(summary)}"""
