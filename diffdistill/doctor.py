"""`diffdistill doctor`: the environment, whether a teacher is read as it was trained, whether a run is well."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffdistill.config import build, check_verb, compose, gathered
from diffdistill.errors import UserError
from diffdistill.evaluation.course import Verdict
from diffdistill.evaluation.health import judge
from diffdistill.probe import Probe, ask
from diffdistill.recipe import assemble
from diffdistill.run_course import condition_of
from diffdistill.run_folder import RunFolder

PACKAGES = (
    "diffdistill", "torch", "torchvision", "diffusers", "accelerate", "hydra-core", "omegaconf", "clean-fid", "peft",
    "safetensors", "scikit-learn", "wandb", "transformers",
)  # fmt: skip
EXTRAS = {
    "xformers": ("xformers",),
    "metrics": ("timm", "open_clip"),
    "demo": ("gradio",),
    "notebooks": ("jupyterlab", "nbclient"),
    "dev": ("pytest", "ruff", "mypy"),
}


OWN = ("run", "overrides")


def arguments(words: Sequence[str]) -> list[str]:
    """The words of the command line as keys of this verb."""
    return gathered(words, OWN)


def doctor(run: str | None, overrides: tuple[str, ...]) -> dict[str, Any] | Report:
    """Print and return versions, devices, kernels, extras and cache places; may compile the native kernel.

    run: a run's folder, finished, stopped or going on; its health is judged instead, status 1 with an alarm.
    overrides: of train; with any, the teacher of that recipe is asked instead, as before training.
    """
    if run is not None:
        if overrides:
            fix = "Leave them out: a run has its own configuration."
            raise UserError("run", "must stand alone", f"{run} with {overrides[0]}", fix)
        return run_health(run)
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


@dataclass(frozen=True)
class Report:
    """Of a run's health. condition: of the run itself, in words."""

    condition: str
    verdicts: tuple[Verdict, ...]

    @property
    def alarms(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.state == "alarm")

    @property
    def status(self) -> int:
        """Exit status: 1 with an alarm."""
        return int(bool(self.alarms))


def run_health(run: str) -> Report:
    """Judge a run from what lies in its folder; prints and returns the verdicts.

    Raises UserError if the folder is no run.
    """
    folder = RunFolder(Path(run))
    settings = folder.read_config("run")
    found = condition_of(folder, settings)
    course = found.course
    report = Report(found.line, tuple(judge(course)))
    console = Console()
    console.print(f"{run}: {found.line}", soft_wrap=True, highlight=False)
    if not course.keys("health/"):
        every = OmegaConf.select(settings, "health.every", default=None)
        why = "its health was not measured" if every is None else f"nothing was measured before step {every}"
        console.print(f"what follows is little: {why}", soft_wrap=True, highlight=False)
    advice = ["try first"] if report.alarms else []  # else the others have its room
    table = Table("sign", "verdict", "found", "figure", "threshold", *advice)
    for verdict in report.verdicts:
        figures = ["" if value is None else f"{value:.3g}" for value in (verdict.figure, verdict.threshold)]
        since = "" if verdict.step is None else f" since step {verdict.step}"
        shown = {"well": "well", "alarm": f"[bold red]alarm{since}[/]", "unknown": "not judged"}[verdict.state]
        table.add_row(verdict.name, shown, escape(verdict.words), *figures, *([escape(verdict.fix)] if advice else []))
    console.print(table)
    judged = sum(verdict.state != "unknown" for verdict in report.verdicts)
    told = (
        f"{len(report.alarms)} alarm{'s' if len(report.alarms) != 1 else ''}, {judged} of {len(report.verdicts)} signs"
    )
    console.print(f"{told} judged", highlight=False)
    return report


def _teacher(overrides: Sequence[str]) -> dict[str, Any]:
    """Ask the teacher of a recipe; its residuals by noise level."""
    from diffdistill.launch import train  # with what only training needs

    settings = compose("train", [*overrides, "run_dir=none"])
    check_verb(settings, train)
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
