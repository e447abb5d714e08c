"""Samplers that come from outside a run: diffusers pipeline folders, and other step counts."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.generator import Generator
from diffdistill.rng import Rng
from diffdistill.solvers import OdeSampler, Sampler


@dataclass(frozen=True)
class PipelineSampler:
    """A diffusers pipeline folder as a sampler. It draws its own noise, seeded by rng; z is only its batch size.

    call: keyword arguments of every call, from the folder's call.json if it has one.
    """

    pipeline: Any
    call: dict[str, Any]
    nfe: int

    @classmethod
    def load(cls, folder: str, steps: int | None = None) -> PipelineSampler:
        """Raises UserError if `folder` is not a pipeline. steps: num_inference_steps instead of call.json's grid."""
        from diffusers import DiffusionPipeline

        path = Path(folder)
        if not (path / "model_index.json").is_file():
            raise UserError(
                "pipeline",
                "must be a diffusers pipeline folder (with model_index.json)",
                folder,
                "Look one level down.",
            )
        try:
            pipeline = DiffusionPipeline.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError("pipeline", "must load in diffusers", folder, str(error).splitlines()[0]) from error
        pipeline.set_progress_bar_config(disable=True)
        contract = json.loads((path / "call.json").read_text()) if (path / "call.json").is_file() else {"call": {}}
        call = contract["call"] if steps is None else {"num_inference_steps": steps}
        signature = inspect.signature(pipeline.__call__).parameters
        default = signature["num_inference_steps"].default if "num_inference_steps" in signature else 1
        nfe = contract.get("nfe", default) if steps is None else steps
        return cls(pipeline, call, nfe)

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """Images [B, C, H, W] in [-1, 1]."""
        parameters = inspect.signature(self.pipeline.__call__).parameters
        inputs: dict[str, Any] = {"batch_size": z.shape[0]}
        if "label" in cond:
            if "class_labels" not in parameters:
                raise UserError(
                    "pipeline", "must take class_labels for data with classes", type(self.pipeline), "Use another."
                )
            inputs["class_labels"] = cond["label"]
        generator = torch.Generator().manual_seed(rng.torch_seed())
        images = self.pipeline(**inputs, **self.call, generator=generator, output_type="pt").images
        return torch.as_tensor(images) * 2 - 1


def with_steps(sampler: Sampler, steps: int | None) -> Sampler:
    """The sampler with another number of steps. An ODE sampler has a grid for any; a student only if it knows one."""
    if steps is None:
        return sampler
    if steps < 1:
        raise UserError("steps", "must be >= 1", steps, "Leave it out for what the generator was made for.")
    if isinstance(sampler, OdeSampler | Generator):
        return sampler.with_steps(steps)
    if steps != sampler.nfe:
        raise UserError(
            "steps", f"must be {sampler.nfe}, the number the student was trained for", steps, "Leave it out."
        )
    return sampler
