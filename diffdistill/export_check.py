"""An exported folder against the run it came from: in a process of its own, on the same noise."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.generator import Generator
from diffdistill.networks.files import resolve
from diffdistill.solvers import OdeSampler

if TYPE_CHECKING:
    from typing import Any

    from diffdistill.recipe import Recipe

TOLERANCE = 1e-5  # largest absolute difference on [0, 1]

# Runs alone: no import of this package, no environment, no current folder on the path.
_CHILD = """
import json, sys
sys.modules["diffdistill"] = None
import diffusers, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, out, inputs, kind, base = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(base or folder, use_safetensors=True)
if base:
    pipeline.load_lora_weights(folder, use_safetensors=True)
    name = json.load(open(folder + "/scheduler/scheduler_config.json"))["_class_name"]
    pipeline.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
pipeline.set_progress_bar_config(disable=True)
call = json.load(open(folder + "/call.json"))["call"]
made = pipeline(**inputs, **call, generator=torch.Generator().manual_seed(0), output_type=kind)
images = made.images if hasattr(made, "images") else made.frames
save_file({"images": torch.as_tensor(images).contiguous()}, out)
"""


def made_alone(folder: Path, inputs: Mapping[str, Any], kind: str = "pt", base: str = "") -> Tensor:
    """What the folder's pipeline makes of `inputs` in a process without this package, with output_type=kind.

    base: the pipeline that a folder of LoRA weights and a scheduler is laid on.
    """
    with tempfile.TemporaryDirectory() as aside:
        result = Path(aside) / "images.safetensors"
        told = (str(folder), str(result), json.dumps(inputs), kind, base and str(resolve(base)))
        command = [sys.executable, "-I", "-c", _CHILD, *told]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError("export", "must load in diffusers alone", str(folder), f"diffusers said: {last}")
        return load_file(result)["images"]


def same_draws(
    recipe: Recipe, generator: Generator | OdeSampler, cond: Mapping[str, Tensor], num: int, scale: float = 1.0
) -> Tensor:
    """The generator's samples from the noise that a pipeline draws with seed 0, times `scale`."""
    device = recipe.networks.device
    draws = TorchDraws(0, device)
    z = draws.normal((num, *recipe.data.shape), torch.float32)
    cond = {key: value.to(device) for key, value in cond.items()}
    return generator.sample(scale * z, cond, draws).cpu()  # type: ignore[arg-type]


def check_close(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """The largest difference, refused above the tolerance."""
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance:
        constraint = f"must equal the run's own samples within {tolerance:g}"
        raise UserError("export", constraint, f"{difference:.3g}", "Nothing was written.")
    return difference


class TorchDraws:
    """Our generator's draws taken from torch's, in the order the stock pipeline takes them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.source, self.device = torch.Generator().manual_seed(seed), device

    def fork(self, name: str) -> TorchDraws:
        return self

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.source, dtype=dtype).to(self.device)
