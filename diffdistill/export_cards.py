"""What an exported folder says about itself: its README, and the figures that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdistill.evaluation import harness
from diffdistill.evaluation.protocol import Protocol
from diffdistill.export_check import TOLERANCE
from diffdistill.generator import Generator
from diffdistill.hashing import file_sha256
from diffdistill.networks.diffusers import UNet2D
from diffdistill.networks.files import resolve

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe


def write_card(folder: Path, weights: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """metrics.json, where figures were measured."""
    if summary.get("student"):
        figures, protocol = dict(summary["student"]), Protocol.from_json(summary["protocol"])
        harness.write_card(folder / "metrics.json", figures, protocol, file_sha256(weights), command_of(settings))


def pipeline_readme(
    recipe: Recipe,
    generator: Generator,
    call: Mapping[str, Any],
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> str:
    teacher = str(settings["networks"].get("path", settings["networks"]["_target_"]))
    method = type(recipe.distiller).__name__
    labels = ", class_labels=[0, 1, 2, 3]" if recipe.data.num_classes else ""
    keywords = "".join(f", {key}={value}" for key, value in call.items())
    return f"""---
license: {licence_of(teacher)}
base_model: {teacher}
library_name: diffusers
tags: [diffdistill, {method.lower()}, few-step]
---
# {method} student of {teacher}

{generator.nfe} network evaluation(s) per sample, no guidance. Load it with diffusers alone:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
images = pipeline(batch_size=4{labels}{keywords}).images
```

`call.json` holds the keyword arguments of that call and the hashes of the files. The folder was verified when it was
written: a fresh process without diffdistill gave the training code's samples within {TOLERANCE:g}.

{figures_table(summary)}
Licence of the teacher: {licence_of(teacher)}. The student is derived from it.
"""


def model_readme(recipe: Recipe, description: str, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    source = recipe.data.source
    return f"""---
license: {source.licence}
---
# Denoiser of {recipe.data.name}

{description}

Made by `{command_of(settings)}`. Training data: {source.description}.

{figures_table(summary)}"""


MLP_DESCRIPTION = """An MLP of this package (`diffdistill.networks.mlp.mlp(path)`): config.json holds its shape, the
process is EDM, the raw output F: x0 = c_skip x + c_out F(x / sqrt(sigma^2 + sigma_data^2), ln(sigma) / 4)."""


def unet_description(network: UNet2D) -> str:
    process, kind = network.process, network.kind
    null = f" Class row {network.num_classes - 1} is the null condition (label dropout)." if network.null else ""
    return f"""A stock `diffusers.UNet2DModel` under the process and scalings of `CMStochasticIterativeScheduler`
with sigma_min {process.t_min}, sigma_max {process.t_max}, sigma_data {kind.sigma_data}:
x0 = c_skip x + c_out F(x / sqrt(sigma^2 + sigma_data^2), 250 ln sigma). Pixels lie in [-1, 1].{null}"""


def figures_table(summary: Mapping[str, Any]) -> str:
    student = summary.get("student") or {}
    if merged := summary.get("merged"):
        share = merged["weight"]
        return (
            f"The weights are merged: {1 - share:g} of this run's student and {share:g} of that of `{merged['run']}`."
            " No figures were measured.\n"
        )
    if not student:
        return "No figures were measured in this run.\n"
    lines = [
        f"| {key} | {value if isinstance(value, int | list) else format(value, '.4g')} |"
        for key, value in student.items()
    ]
    protocol = summary["protocol"]
    return (
        "| figure | value |\n|---|---|\n" + "\n".join(lines)
        + f"\n\nMeasured on {protocol['num_samples']} samples against {protocol['reference_size']} of"
        + f" {protocol['reference']}, seed {protocol['seed']}; intervals: {protocol['interval']}.\n"
    )  # fmt: skip


def command_of(settings: Mapping[str, Any]) -> str:
    return f"diffdistill train {settings['command']}".rstrip()


def licence_of(teacher: str) -> str:
    """The licence in the front matter of the teacher's README, or `unknown`."""
    card = Path(resolve(teacher)) / "README.md"
    lines = card.read_text().splitlines() if card.is_file() else []
    return next((line.removeprefix("license:").strip() for line in lines if line.startswith("license:")), "unknown")
