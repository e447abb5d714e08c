"""A trained set of adapters as two files, and its life on a stock pipeline: attach, set the scale, detach.

The folder holds agd_adapters.safetensors and agd_adapters.json. Attached, the pipeline's own guidance has to be off
(guidance_scale=1): one call then answers as the two guided ones of scale w did.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.generator import constant_inputs
from diffdistill.networks.adapter import Adapters, AdapterSpec, Hooks, SiteShape
from diffdistill.process import X0
from diffdistill.run_folder import read_json

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe

SCHEMA = 1
WEIGHTS, DESCRIPTION = "agd_adapters.safetensors", "agd_adapters.json"
TOLERANCE = 1e-5  # largest relative difference between the student and the file read back


class Attached:
    """Adapters at work on a pipeline. scale: w, the full guidance scale; assign to it between calls."""

    def __init__(self, network: nn.Module, adapters: Adapters, scale: float, trained: tuple[float, float]) -> None:
        self.adapters, self.trained = adapters, trained
        self.scale = scale
        self._hooks: Hooks = adapters.hang(network, self._current)

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        low, high = self.trained
        if not low <= scale <= high:
            raise UserError("scale", f"must lie in the trained range [{low:g}, {high:g}]", scale, "Choose within it.")
        self._scale = float(scale)

    def detach(self) -> None:
        """Leave the pipeline as it was."""
        self._hooks.remove()

    def _current(self) -> Tensor:
        return torch.tensor([self._scale])


def write_adapters(recipe: Recipe, out: Path, settings: Mapping[str, Any]) -> Path:
    """Write the student's adapters into the new folder `out`, read them back and compare; returns the folder.

    Raises UserError if the student has none, if `out` exists, or if the files read back differ.
    """
    networks = recipe.networks
    if networks.modes.get("student") != "adapter":
        given = f"roles.student={networks.modes.get('student')}"
        raise UserError("format", "adapter needs a student made of adapters", given, "Use format=pipeline.")
    if out.exists():
        raise UserError("out", "must not exist yet", str(out), "Name another folder.")
    adapters = networks.module("student")
    assert isinstance(adapters, Adapters)
    scales, scale = settings["trajectories"]["scales"], constant_inputs(recipe.distiller.generator)["w"]
    description = {
        "schema": SCHEMA,
        "kind": adapters.spec.kind,
        "width": adapters.spec.width,
        "sites": {name: asdict(shape) for name, shape in adapters.shapes.items()},
        "scales": [float(scales["low"]), float(scales["high"])],
        "scale": scale,
        "base": str(settings["networks"].get("path", settings["networks"]["_target_"])),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        folder = Path(aside) / out.name
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in adapters.state_dict().items()}, folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        (folder / "README.md").write_text(_readme(description))
        _verify(recipe, folder, scale)
        folder.rename(out)
    return out


def attach(pipeline: Any, path: str | Path, scale: float | None = None) -> Attached:
    """Let the adapters in the folder `path` act on a pipeline's unet or transformer, or on such a module itself.

    scale: w of the guided pair of calls that one call shall answer as; None is the one they were trained to show.
    The base may be any checkpoint with the modules and widths that the adapters were built for.
    Raises UserError if the folder is not whole, or the network has no such modules.
    """
    folder, network = Path(path), _network(pipeline)
    found = read_json(folder / DESCRIPTION, "path")
    if found.get("schema") != SCHEMA:
        raise UserError("path", f"must be of schema {SCHEMA}", found.get("schema"), "Use the version that wrote it.")
    shapes = {name: SiteShape(**shape) for name, shape in found["sites"].items()}
    names = dict(network.named_modules())
    if missing := sorted(set(shapes) - set(names)):
        fix = f"They were trained on {found['base']}."
        raise UserError("pipeline", "must have the modules that the adapters act on", missing[:3], fix)
    adapters = Adapters(AdapterSpec(found["kind"], found["width"]), shapes)
    try:
        adapters.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError("path", "must hold whole adapters", str(folder / WEIGHTS), f"{first}.") from error
    reference = next(network.parameters())
    adapters.to(reference.device).requires_grad_(False).eval()
    return Attached(network, adapters, found["scale"] if scale is None else scale, tuple(found["scales"]))


def _network(pipeline: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            return module
    if isinstance(pipeline, nn.Module):
        return pipeline
    raise UserError("pipeline", "must have a unet or a transformer", type(pipeline).__name__, "Give a pipeline.")


@torch.no_grad()
def _verify(recipe: Recipe, folder: Path, scale: float) -> None:
    """The files, attached to a bare copy of the base, against the student on one batch."""
    networks = recipe.networks
    student = networks["student"]
    bare = networks.bare()
    attached = attach(bare.backbone, folder, scale)
    size, device = 8, networks.device
    t = torch.logspace(-1.5, 0.5, size, device=device).clamp(student.process.t_min, student.process.t_max)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(size, *recipe.data.shape, generator=draw).to(device, networks.dtype)
    cond = {key: value.expand(size, *value.shape[1:]).to(device) for key, value in networks.cond.items()}
    ours = student(x, t, {**cond, "w": torch.full_like(t, scale)})
    raw = bare((bare.scale(t).view(-1, *[1] * (x.ndim - 1)) * x).to(x.dtype), bare.time(t), cond)
    theirs = student.process.convert(raw, x, t, bare.kind, X0)
    attached.detach()
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-6))
    if not difference <= TOLERANCE:
        constraint = f"must equal the student within {TOLERANCE:g}"
        raise UserError("export", constraint, f"{difference:.3g}", "Nothing was written.")


def _readme(found: Mapping[str, Any]) -> str:
    low, high = found["scales"]
    return f"""---
base_model: {found["base"]}
tags: [diffdistill, agd, adapter]
---
# Guidance adapters for {found["base"]}

One network call in place of the two of classifier-free guidance, for scales {low:g} to {high:g} (1 is no guidance).
{len(found["sites"])} site(s), kind {found["kind"]}, width {found["width"]}.

```python
from diffdistill.export import attach

attached = attach(pipeline, "this folder", scale={found["scale"]:g})
images = pipeline(..., guidance_scale=1.0).images   # the pipeline's own guidance off
attached.detach()
```
"""
