"""Tensors that the teacher makes before the first step, kept in files.

A file's name carries the hash of all that decides its content: teacher weights, network, sampler, guidance, data, seed
and number.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdistill import ranks
from diffdistill.config import build
from diffdistill.config_types import show
from diffdistill.errors import UserError
from diffdistill.networks.lora import base_state
from diffdistill.recipe import MADE, Recipe
from diffdistill.shards import whole

DECIDING = ("networks", "sampler", "guidance", "data")
Made = tuple[dict[str, Tensor], float]  # tensors by name, CPU seconds that making them took


class Prepared(Protocol):
    """What a teacher made before the first step."""

    @property
    def cpu_seconds(self) -> float: ...

    def join(self, recipe: Recipe) -> Recipe:
        """The recipe on data that also holds it."""
        ...

    def summary(self) -> dict[str, Any]:
        """For summary.json: num, cpu_seconds, reused."""
        ...


class Source(Protocol):
    """How much of it, and where it is kept. num: of items.  cache: a folder, None is the run's own."""

    @property
    def num(self) -> int: ...
    @property
    def cache(self) -> str | None: ...

    def check(self, recipe: Recipe) -> None:
        """Raises UserError if the teacher cannot make it."""
        ...

    def prepare(self, recipe: Recipe, settings: Mapping[str, Any], run_folder: Path) -> Prepared:
        """Read where it was made before, else made and written."""
        ...

    def make(self, recipe: Recipe) -> Prepared:
        """Made, nothing read or written."""
        ...


def sources(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Source]:
    """What a recipe's method needs the teacher to make, by configuration key, checked against the teacher."""
    found: dict[str, Source] = {key: build(settings[key]) for need, key in MADE.items() if need in recipe.needs}
    for source in found.values():
        source.check(recipe)
    return found


def check_cache(cache: str | None) -> None:
    """Refuse a cache that is no folder and cannot become one; None is the run's own folder."""
    if cache is not None and (reason := why_no_folder(cache)):
        raise UserError("cache", f"must name a folder, or be null: {reason}", show(cache), "Write another one.")


def key_of(recipe: Recipe, settings: Mapping[str, Any], rest: Mapping[str, Any]) -> str:
    """The hash of everything that decides what a teacher makes. rest: JSON values beyond teacher and DECIDING nodes."""
    digest = hashlib.sha256()
    for name, value in sorted(base_state(recipe.networks.teacher)):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(whole(value)))
    nodes = {name: _plain(settings[name]) for name in DECIDING}
    digest.update(json.dumps({"nodes": nodes, **rest}, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def read_or_make(folder: Path, kind: str, key: str, make: Callable[[], Made]) -> tuple[Made, bool]:
    """What `make` gives, and whether it was read from folder/kind-key.safetensors; a damaged file is made anew.

    Several processes make it together, the main one writes it, and all have what lies in the file.
    """
    file = folder / f"{kind}-{key[:24]}.safetensors"
    found = ranks.on_main(lambda: _found(file, kind, key))
    if not found:
        made = make()
        ranks.on_main(lambda: _write(file, *made, key))
        if ranks.is_main():
            return made, False
    if (read := _read(file, key)) is None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
    return read, found


def _found(file: Path, kind: str, key: str) -> bool:
    """Whether the file is there and whole; if not, whether it can be written is told before the work."""
    if file.is_file():
        if _read(file, key) is not None:
            return True
        Console(stderr=True).print(f"{file} is damaged: the {kind} are made anew", soft_wrap=True, highlight=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.parent))
    return False


def why_no_folder(path: str) -> str:
    """Why no folder can be at `path`; empty if one can."""
    if not path.strip():
        return "it is empty"
    place = Path(path).absolute()
    try:
        above = next(part for part in (place, *place.parents) if part.exists())
    except OSError as error:  # too long, a loop of links
        return str(error.strerror)
    return "" if above.is_dir() else f"{above} is a file"


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _write(file: Path, tensors: Mapping[str, Tensor], cpu_seconds: float, key: str) -> None:
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    meta = {"key": key, "cpu_seconds": repr(cpu_seconds), "sha256": _content(tensors)}
    aside = file.with_name(f".{file.name}.{os.getpid()}")  # two makers write the same: the last rename stands
    try:
        save_file(tensors, aside, meta)
        os.replace(aside, file)
    except SafetensorError as error:
        raise OSError(None, str(error), str(file)) from error
    finally:
        aside.unlink(missing_ok=True)


def _read(file: Path, key: str) -> Made | None:
    """The content of a file, or None if it is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            meta = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return None
    if meta.get("key") != key or meta.get("sha256") != _content(tensors):
        return None
    return tensors, float(meta["cpu_seconds"])


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
