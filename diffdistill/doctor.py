"""`diffdistill doctor`: what this environment has, and whether a teacher is read as it was trained."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffdistill.config import build, compose, gathered
from diffdistill.errors import UserError
from diffdistill.probe import Probe, ask
from diffdistill.recipe import assemble

PACKAGES = (
    "diffdistill", "torch", "torchvision", "diffusers", "accelerate", "hydra-core", "omegaconf", "clean-fid", "peft",
    "safetensors", "scikit-learn", "wandb", "transformers",
)  # fmt: skip
EXTRAS = {"xformers": ("xformers",), "notebooks": ("jupyterlab", "nbclient"), "dev": ("pytest", "ruff", "mypy")}
OWN = ("run", "overrides")


def arguments(words: Sequence[str]) -> list[str]:
    """The words of the command line as keys of this verb."""
    return gathered(words, OWN)


def doctor(run: str | None, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Print and return versions, devices, kernels, extras and cache places; may compile the native kernel.

    overrides: of train; with any, the teacher of that recipe is asked instead, as before training.
    """
    if run is not None:
        raise UserError("run", "is not looked at yet: doctor reports on the environment only", run, "Leave run out.")
    if overrides:
        return _teacher(overrides)
    report = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "kernels": _kernels(),
        "extras": {extra: _extra(names) for extra, names in EXTRAS.items()},
        "caches": _caches(),
        "assets": _assets(),
    }
    table = Table("what", "found", show_lines=False)
    for key, value in report.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for name, found in rows:
            table.add_row(f"{key} {name}".strip(), str(found))
    Console().print(table)
    return report


def _teacher(overrides: Sequence[str]) -> dict[str, Any]:
    """Ask the teacher of a recipe; its residuals by noise level."""
    settings = compose("train", [*overrides, "run_dir=none"])
    probe: Probe | None = build(settings["probe"])
    if probe is None:
        raise UserError("probe", "must not be null here", None, "Leave it out.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    verdict = ask(probe, assemble({str(key): settings[key] for key in settings}, device), settings["networks"])
    table = Table("noise-to-signal ratio, in standard deviations of the data", "residual, of a straight line's")
    residuals = () if verdict.declared is None else verdict.declared.residuals
    for level, residual in zip(verdict.levels, residuals, strict=False):
        table.add_row(f"{level:.3g}", f"{residual:.3g}")
    if residuals:
        Console().print(table)
    return {"levels": list(verdict.levels), "residuals": list(residuals), "condition": verdict.condition}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    name = platform.processor() or platform.machine()
    found = {"cpu": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    found["cuda"] = "available" if torch.cuda.is_available() else "none"
    found["cpu instructions"] = torch.backends.cpu.get_cpu_capability()
    return found


def _kernels() -> dict[str, str]:
    from diffdistill.kernels.attention import cpu
    from diffdistill.kernels.attention.triton_kernels import support

    missing = cpu.why_not()  # the first look may compile it
    native = f"native, {cpu.variant()}" if missing is None else f"torch only: {missing}"
    found = {"block-sparse attention, cpu": native, "c++ compiler": shutil.which("c++") or "none"}
    for index in range(torch.cuda.device_count()):
        missing = support.missing(index)
        name = f"triton {_version('triton')}" if missing is None else f"torch only: {missing}"
        found[f"block-sparse attention, cuda:{index}"] = name
    return found


def _extra(names: tuple[str, ...]) -> str:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return "installed" if not missing else f"missing: {', '.join(missing)}"


def _caches() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE
    from torch.hub import get_dir

    return {"hugging face hub": HF_HUB_CACHE, "torch hub": get_dir()}


def _assets() -> dict[str, str]:
    folder = Path(__file__).parent / "assets"
    return {
        p.name: f"{sum(f.stat().st_size for f in p.iterdir()) / 1e6:.2f} MB"
        for p in sorted(folder.iterdir())
        if p.is_dir()
    }
