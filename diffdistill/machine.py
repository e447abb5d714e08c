"""What a measurement of time ran on, and with which libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Architecture, processor, cores, torch version and its threads."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of this package and what its results depend on most."""
    names = ("diffdistill", "torch", "diffusers", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
