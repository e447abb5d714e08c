"""Samplers that come from outside a run: diffusers pipeline folders, and other step counts."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffdistill.config_errors import first_line
from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.generator import Generator
from diffdistill.hashing import file_sha256
from diffdistill.networks.files import quiet_libraries, refuse_unsafe
from diffdistill.rng import Rng
from diffdistill.solvers import OdeSampler, Sampler

SCHEMA = 1  # of call.json
CALL = "call.json"
DENOISERS = ("unet", "transformer", "transformer_2")  # parts of a pipeline whose calls are its network evaluations


@dataclass(frozen=True)
class PipelineSampler:
    """A diffusers pipeline folder as a sampler. It draws its own noise, seeded by rng; z is only its batch size.

    call: keyword arguments of every call, from the folder's call.json if it has one.  prompts: of each class, for
    pipelines that are told in words.  settled: whether a call.json says how it is called.
    """

    pipeline: Any
    call: dict[str, Any]
    nfe: int
    prompts: tuple[str, ...] = ()
    settled: bool = False

    @classmethod
    def load(cls, folder: str, steps: int | None = None, dtype: torch.dtype | None = None) -> PipelineSampler:
        """Raises UserError, naming the file, if `folder` (or hub id ORGANISATION/NAME) is not a whole pipeline.

        It goes to the GPU where there is one.  steps: num_inference_steps instead of call.json's grid.  dtype: of its
        networks, None is diffusers' choice.
        """
        from diffusers import DiffusionPipeline

        path = _located(folder)
        if steps is not None and steps < 1:
            raise UserError("steps", "must be >= 1", steps, "Leave it out for what the pipeline was made for.")
        if not (path / "model_index.json").is_file():
            raise UserError(
                "pipeline",
                "must be a diffusers pipeline folder (with model_index.json)",
                folder,
                "Look one level down.",
            )
        refuse_unsafe(path, "pipeline")
        contract = _contract(path)
        _check_files(path, contract.get("sha256", {}))
        try:
            with quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch_dtype has a new name in newer diffusers
                pipeline = DiffusionPipeline.from_pretrained(
                    str(path), local_files_only=True, use_safetensors=True, torch_dtype=dtype
                )
            if torch.cuda.is_available():
                pipeline.to("cuda")
            pipeline.set_progress_bar_config(disable=True)
            signature = inspect.signature(pipeline.__call__).parameters
        except Exception as error:  # diffusers checks little of what it reads
            raise UserError("pipeline", "must load in diffusers", folder, first_line(error)) from error
        call = contract["call"]
        if steps is not None:  # in place of the grid it was made for
            call = {**{key: value for key, value in call.items() if key != "timesteps"}, "num_inference_steps": steps}
        if unknown := sorted(call.keys() - signature.keys()):
            fix = f"{type(pipeline).__name__} takes {', '.join(signature)}."
            raise _refused(path / CALL, f"must hold keywords of the pipeline's call, not {unknown[0]}", fix)
        default = signature["num_inference_steps"].default if "num_inference_steps" in signature else 1
        nfe = contract.get("nfe", default) if steps is None else steps
        return cls(pipeline, call, nfe, tuple(contract.get("prompts", ())), (path / CALL).is_file())

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """Images [B, C, H, W], or videos [B, C, T, H, W], in [-1, 1]."""
        parameters = inspect.signature(self.pipeline.__call__).parameters
        inputs: dict[str, Any] = {} if self.prompts else {"batch_size": z.shape[0]}
        if self.prompts and "label" in cond:
            if int(cond["label"].max()) >= len(self.prompts):
                found = f"class {int(cond['label'].max())}"
                raise UserError("data", f"must have the pipeline's {len(self.prompts)} prompts", found, "Use its own.")
            inputs["prompt"] = [self.prompts[label] for label in cond["label"].tolist()]
        elif "label" in cond:
            if "class_labels" not in parameters:
                raise UserError(
                    "pipeline", "must take class_labels for data with classes", type(self.pipeline), "Use another."
                )
            inputs["class_labels"] = cond["label"].to(self.pipeline.device)
        images = self.made(inputs, torch.Generator().manual_seed(rng.torch_seed()))
        if images.ndim == 5 and z.shape[1] == 1:  # a grey video in three channels
            images = images.mean(1, keepdim=True)
        return images * 2 - 1

    @torch.no_grad()
    def made(self, inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """What one call makes of `inputs`: images [B, C, H, W], or videos [B, C, T, H, W], in [0, 1]."""
        try:
            made = self.pipeline(**inputs, **self.call, generator=generator, output_type="pt")
        except Exception as error:  # diffusers and torch refuse values of call.json, or steps, in their own ways
            fix = f"{first_line(error)} Mend call.json or steps, or export it again."
            raise UserError("pipeline", f"must run with {self.call}", type(self.pipeline).__name__, fix) from error
        images = torch.as_tensor(made.images if hasattr(made, "images") else made.frames)
        return images.transpose(1, 2) if images.ndim == 5 else images  # videos come frame by frame


def _located(name: str) -> Path:
    """The folder of a pipeline; what a hub id names is looked for in the hub's cache, else downloaded to it."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).parent.exists():
        return Path(name)
    from diffusers import DiffusionPipeline

    try:
        with quiet_libraries():
            return Path(DiffusionPipeline.download(name))
    except Exception as error:  # the hub's libraries have many ways to say no
        fix = f"{first_line(error)} There is no such folder either."
        raise UserError("pipeline", "must be a diffusers pipeline folder or a hub id", name, fix) from error


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a pipeline folder that decides about its samples, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors") and path.name != CALL)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def write_contract(folder: Path, call: Mapping[str, Any], nfe: int, times: Sequence[float], **more: Any) -> None:
    """call.json of a folder that is otherwise whole: keywords of the call, what it costs, hashes of the files."""
    contract = {"schema": SCHEMA, "call": call, "nfe": nfe, "times": list(times), **more, "sha256": hashes(folder)}
    (folder / CALL).write_text(json.dumps(contract, indent=1) + "\n")


def _contract(folder: Path) -> dict[str, Any]:
    """What call.json holds; a folder of another program has none."""
    path = folder / CALL
    if not path.is_file():
        return {"call": {}}
    contract = _json(path)
    if not isinstance(contract, dict) or contract.get("schema") != SCHEMA:
        raise _refused(path, f"must be a mapping with schema {SCHEMA}")
    call, nfe, listed = contract.get("call"), contract.get("nfe"), contract.get("sha256", {})
    if not isinstance(call, dict):
        raise _refused(path, "must hold a mapping call")
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise _refused(path, f"must hold an integer nfe >= 1, not {nfe!r}")
    if not isinstance(listed, dict) or not all(isinstance(value, str) for value in listed.values()):
        raise _refused(path, "must hold a mapping sha256 of texts")
    return contract


def _check_files(folder: Path, listed: Mapping[str, str]) -> None:
    """Refuse files that changed since the export, where call.json lists their hashes, and JSON that cannot be read."""
    fix = f"Export it again, or delete sha256 from {CALL} if the change is meant."
    for name, sha256 in listed.items():
        if not (folder / name).is_file():
            raise _refused(folder / name, "is missing", fix)
        if file_sha256(folder / name) != sha256:
            raise _refused(folder / name, "changed since the export", fix)
    for path in sorted(folder.rglob("*.json")):
        if not isinstance(_json(path), dict):
            raise _refused(path, "must hold a mapping")
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise _refused(path, "cannot be read as safetensors", f"{error}. Export it again.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, "cannot be read as JSON", f"{error}. Export it again.") from error


def _refused(path: Path, what: str, fix: str = "Export it again.") -> UserError:
    return UserError("pipeline", "must be a whole diffusers folder", f"{path}, which {what}", fix)


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
