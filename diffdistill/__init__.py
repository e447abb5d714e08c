"""Distil pretrained diffusion and flow models into one- or few-step generators.

The verbs of the command line are functions here, with the same keys:

    import diffdistill
    diffdistill.train("experiment=digits_dmd2", run_dir="runs/x")
    diffdistill.sample(run="runs/x", num=16)

Strings are overrides as the command line writes them, keywords are keys. A mistake in either raises UserError.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

from . import logs
from .errors import UserError

__all__ = ["UserError", "compare", "distill", "doctor", "evaluate", "export", "precompute", "report", "sample", "train"]


def train(*overrides: str, **keys: Any) -> Any:
    """Distil a teacher, or train one: `diffdistill train`."""
    return _verb("train", overrides, keys)


def distill(model: str, *overrides: str, **keys: Any) -> Any:
    """Distil a diffusers pipeline on prompts alone: `diffdistill distill`. overrides: of train."""
    return _verb("distill", (), {"model": model, **({"overrides": list(overrides)} if overrides else {}), **keys})


def precompute(*overrides: str, **keys: Any) -> Any:
    """Encode captioned images for training: `diffdistill precompute`."""
    return _verb("precompute", overrides, keys)


def sample(*overrides: str, **keys: Any) -> Any:
    """Draw a grid of samples: `diffdistill sample`."""
    return _verb("sample", overrides, keys)


def evaluate(*overrides: str, **keys: Any) -> Any:
    """Measure samples against real data: `diffdistill evaluate`."""
    return _verb("evaluate", overrides, keys)


def export(*overrides: str, **keys: Any) -> Any:
    """Write a run's generator for others to load: `diffdistill export`."""
    return _verb("export", overrides, keys)


def _attach(pipeline: Any, path: Any, scale: float | None = None) -> Any:
    from .adapter_file import attach

    return attach(pipeline, path, scale)


export.attach = _attach  # type: ignore[attr-defined]  # as diffdistill.export.attach of the module of that name


def compare(*overrides: str, **keys: Any) -> Any:
    """Train several methods under one budget: `diffdistill compare`."""
    return _verb("compare", overrides, keys)


def doctor(*overrides: str, **keys: Any) -> Any:
    """Report on the environment, or on a run: `diffdistill doctor`."""
    return _verb("doctor", overrides, keys)


def report(*overrides: str, **keys: Any) -> Any:
    """Write one HTML file about a run or a comparison: `diffdistill report`."""
    return _verb("report", overrides, keys)


def _verb(name: str, overrides: tuple[str, ...], keys: dict[str, Any]) -> Any:
    from .cli import VERBS, function_of  # torch, Hydra and diffusers are loaded by the first call
    from .config import call, compose, override

    if not logging.getLogger().handlers:  # else the caller has a way of its own
        logs.begin()
    verb = VERBS[name]
    words = [*overrides, *(override(key, value) for key, value in keys.items())]
    return call(compose(verb.config, words), function_of(verb))


class _Package(ModuleType):
    """Keeps `diffdistill.export` the verb after the module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
