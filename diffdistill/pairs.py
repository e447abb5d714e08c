"""Pairs of prior noise and the teacher's deterministic sample from it, made once per teacher and kept in a cache.

They serve regressions such as DMD's (arXiv:2311.18828, section 4.3). A file's name carries the hash of all that decides
its content: teacher weights, network, sampler, guidance, data, seed and number.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdistill.config_types import show
from diffdistill.data import Data, epoch_indices
from diffdistill.distillers.base import Batch, Pair
from diffdistill.errors import UserError, require_at_least
from diffdistill.networks.lora import base_state
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng

DECIDING = ("networks", "sampler", "guidance", "data")


@dataclass(frozen=True)
class Pairs:
    """z, x0: [N, *shape] on the CPU.  cond: [N, ...] by name.  cpu_seconds: what making them took.  reused: from the
    cache."""

    z: Tensor
    x0: Tensor
    cond: Mapping[str, Tensor]
    cpu_seconds: float
    reused: bool

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {"num": len(self.z), "cpu_seconds": round(self.cpu_seconds, 2), "reused": self.reused}


@dataclass(frozen=True)
class PairSource:
    """How many pairs, and where they are kept.

    num: of pairs.  seed: of their noise and conditions, which are keyed by the pair's index.  batch_size: of the
    teacher's calls; it does not change the pairs.  cache: a folder that runs share, None is the run's own.
    """

    num: int
    seed: int
    batch_size: int
    cache: str | None

    def __post_init__(self) -> None:
        require_at_least(1, num=self.num, batch_size=self.batch_size)
        require_at_least(0, seed=self.seed)
        if self.cache is not None and (reason := _no_folder(self.cache)):
            raise UserError(
                "cache", f"must name a folder, or be null: {reason}", show(self.cache), "Write another one."
            )

    def pairs(self, recipe: Recipe, settings: Mapping[str, Any], run_folder: Path) -> Pairs:
        """The pairs of a recipe: read where they were made before, else made and written."""
        folder = Path(self.cache) if self.cache is not None else run_folder / "pairs"
        key = self._key(recipe, settings)
        file = folder / f"pairs-{key[:24]}.safetensors"
        if file.is_file():
            found = _read(file, key)
            if found is not None:
                return found
            Console(stderr=True).print(f"{file} is damaged: the pairs are made anew", soft_wrap=True, highlight=False)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # told before the work, not after it
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        made = self.make(recipe)
        _write(file, made, key)
        return made

    def make(self, recipe: Recipe) -> Pairs:
        """The pairs themselves, nothing read or written."""
        device, dtype, data = recipe.networks.device, recipe.networks.dtype, recipe.data
        parts: list[tuple[Tensor, Tensor, Mapping[str, Tensor]]] = []
        started = time.process_time()
        starts = range(0, self.num, self.batch_size)
        for first in track(starts, "making pairs", transient=True, disable=not sys.stdout.isatty()):
            rng = Rng(self.seed, 0, "pairs", range(first, min(first + self.batch_size, self.num)), device)
            cond = data.conditions(rng.fork("conditions"))
            z = rng.fork("prior").normal((len(rng), *data.shape), dtype)
            x0 = recipe.sampler.sample(z, cond, rng.fork("sampler"))
            parts.append((z.cpu(), x0.cpu(), {name: value.cpu() for name, value in cond.items()}))
        conds = {name: torch.cat([part[2][name] for part in parts]) for name in parts[0][2]}
        seconds = time.process_time() - started
        return Pairs(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), conds, seconds, reused=False)

    def _key(self, recipe: Recipe, settings: Mapping[str, Any]) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(base_state(recipe.networks.teacher)):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        nodes = {name: _plain(settings[name]) for name in DECIDING}
        rest = {"nodes": nodes, "num": self.num, "seed": self.seed, "dtype": str(recipe.networks.dtype)}
        digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
        return digest.hexdigest()


class WithPairs:
    """Data whose batches also hold a `Pair`, in epochs over `pairs`; every other draw is what it was."""

    def __init__(self, data: Data, pairs: Pairs) -> None:
        self.data, self.pairs = data, pairs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        """As the data's, with `pair`."""
        batch = self.data.batch(rng, global_batch, needs, dtype)
        index = torch.from_numpy(epoch_indices(rng, global_batch, len(self.pairs.z)))
        z, x0 = (part[index].to(rng.device, dtype) for part in (self.pairs.z, self.pairs.x0))
        cond = {name: value[index].to(rng.device) for name, value in self.pairs.cond.items()}
        return replace(batch, pair=Pair(z, x0, cond))


def with_pairs(recipe: Recipe, pairs: Pairs) -> Recipe:
    """The recipe on data that also holds the pairs."""
    return replace(recipe, data=cast("Data", WithPairs(recipe.data, pairs)))


def _no_folder(path: str) -> str:
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


def _write(file: Path, pairs: Pairs, key: str) -> None:
    tensors = {"z": pairs.z.contiguous(), "x0": pairs.x0.contiguous()}
    tensors |= {f"cond.{name}": value.contiguous() for name, value in pairs.cond.items()}
    meta = {"key": key, "cpu_seconds": repr(pairs.cpu_seconds), "sha256": _content(tensors)}
    aside = file.with_name(f".{file.name}.{os.getpid()}")  # two makers write the same: the last rename stands
    try:
        save_file(tensors, aside, meta)
        os.replace(aside, file)
    except SafetensorError as error:
        raise OSError(None, str(error), str(file)) from error
    finally:
        aside.unlink(missing_ok=True)


def _read(file: Path, key: str) -> Pairs | None:
    """The pairs of a file, or None if it is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            meta = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return None
    if meta.get("key") != key or meta.get("sha256") != _content(tensors):
        return None
    cond = {name.removeprefix("cond."): value for name, value in tensors.items() if name.startswith("cond.")}
    return Pairs(tensors["z"], tensors["x0"], cond, float(meta["cpu_seconds"]), reused=True)


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
