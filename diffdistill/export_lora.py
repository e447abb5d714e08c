"""A student trained as LoRA, as a file for `pipeline.load_lora_weights`, with the scheduler and the call it needs.

The scale alpha / rank is folded into the second factor, so that no reader has to know it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.export_cards import command_of, figures_table, licence_of
from diffdistill.export_check import check_close, made_alone, same_draws
from diffdistill.export_schedulers import stepped
from diffdistill.export_stock import TOLERANCE, call_of, examples_of, told_data
from diffdistill.generator import Generator
from diffdistill.networks.families.folder import pipeline_class
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.inputs import EmbeddingWithInputs
from diffdistill.networks.lora import LoraLayer
from diffdistill.pipelines import write_contract
from diffdistill.solvers import Sampler

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe


def refusal(recipe: Recipe, sampler: Sampler) -> UserError | None:
    """Why this run's student cannot become a LoRA file, or None."""
    network = recipe.networks["student"].network
    mode = recipe.networks.modes.get("student")
    if mode != "lora":
        return UserError("format", "lora needs a student trained as one", f"roles.student={mode}", "Use pipeline.")
    if not isinstance(network, Stock):
        found = type(network).__name__
        return UserError("format", "lora needs a model of diffusers' families", found, "Use format=pipeline.")
    if recipe.networks.roles["student"].inputs:
        inputs = list(recipe.networks.roles["student"].inputs)
        return UserError("format", "lora needs a student without extra inputs", inputs, "Use format=pipeline.")
    source = pipeline_class(str(told_data(recipe).pipeline))
    if not hasattr(source, "save_lora_weights"):
        return UserError("format", "lora needs a pipeline that loads some", source.__name__, "Use format=pipeline.")
    return None


def factors(network: Stock, role: str) -> Iterator[tuple[str, Tensor]]:
    """The role's low-rank factors by the names that peft gives them in the bare model."""
    for name, module in network.model.named_modules():
        if isinstance(module, LoraLayer) and role in module.down:
            if isinstance(module, EmbeddingWithInputs):
                continue
            down, up = module.factors(role)
            yield f"{name}.lora_A.weight", down.weight.detach().cpu().contiguous()
            yield f"{name}.lora_B.weight", (module.scales[role] * up.weight.detach()).cpu().contiguous()


def write(
    recipe: Recipe, out: Path, settings: Mapping[str, Any], summary: Mapping[str, Any], generator: Sampler
) -> Path:
    """Write the student's LoRA into the new folder `out` and verify it; returns the folder.

    Raises UserError if it cannot be expressed, or the folder on its base gives other latents.
    """
    from diffdistill.export import refusal as pipeline_refusal

    if (reason := pipeline_refusal(recipe, generator) or refusal(recipe, generator)) is not None:
        raise reason
    assert isinstance(generator, Generator)
    network: Stock = recipe.networks["student"].network
    base = str(settings["networks"]["path"])
    steps = stepped(network, generator, base)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        folder = Path(aside) / out.name
        layers = {f"{network.part}_lora_layers": dict(factors(network, "student"))}
        pipeline_class(base).save_lora_weights(folder, **layers, safe_serialization=True)
        steps.scheduler.save_pretrained(folder / "scheduler")
        call = call_of(network, recipe, steps, base)
        (folder / "README.md").write_text(_readme(recipe, generator, call, base, settings, summary, steps.scheduler))
        write_contract(folder, call, generator.nfe, generator.times, base=base)
        texts, cond = examples_of(recipe)
        theirs = network.own_layout(made_alone(folder, {"prompt": texts}, "latent", base), recipe.data.shape)
        ours = steps.after * same_draws(recipe, generator, cond, len(texts), steps.before)
        largest = float(theirs.abs().max())
        check_close(ours / largest, theirs / largest, TOLERANCE)
        folder.rename(out)
    return out


def _readme(
    recipe: Recipe,
    generator: Generator,
    call: Mapping[str, Any],
    base: str,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    scheduler: Any,
) -> str:
    method, licence, name = type(recipe.distiller).__name__, licence_of(base), type(scheduler).__name__
    keywords = "".join(f", {key}={value!r}" for key, value in call.items())
    return f"""---
license: {licence}
base_model: {base}
library_name: diffusers
tags: [diffdistill, {method.lower()}, few-step, lora]
---
# {method} LoRA for {base}

{generator.nfe} network evaluation(s) per sample, no guidance. Load it with diffusers and peft:

```python
from diffusers import DiffusionPipeline, {name}

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("this folder")
pipeline.scheduler = {name}.from_pretrained("this folder", subfolder="scheduler")
result = pipeline("a prompt"{keywords})
```

`call.json` holds the keyword arguments of that call. The folder was verified on its base when it was written: a fresh
process without diffdistill gave the training code's latents within {TOLERANCE:g} of the largest.

Made by `{command_of(settings)}`.

{figures_table(summary)}
Licence of the base: {licence}.
"""
