"""Pairs of prior noise and the teacher's deterministic sample from it, made once per teacher and kept in a cache.

They serve regressions such as DMD's (arXiv:2311.18828, section 4.3). A file's name carries the hash of all that decides
its content: teacher weights, network, sampler, guidance, data, seed and number.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor

from diffdistill.cached_tensors import Made, check_cache, key_of, read_or_make
from diffdistill.data import Data, epoch_indices
from diffdistill.distillers.base import Batch, Pair
from diffdistill.errors import require_at_least
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng


@dataclass(frozen=True)
class Pairs:
    """z, x0: [N, *shape] on the CPU.  cond: [N, ...] by name.  cpu_seconds: what making them took.  reused: from the
    cache."""

    z: Tensor
    x0: Tensor
    cond: Mapping[str, Tensor]
    cpu_seconds: float
    reused: bool

    def stored(self) -> Made:
        """As `cached_tensors` keeps it."""
        tensors = {"z": self.z, "x0": self.x0, **{f"cond.{name}": value for name, value in self.cond.items()}}
        return tensors, self.cpu_seconds

    def join(self, recipe: Recipe) -> Recipe:
        """The recipe on data that also holds the pairs."""
        return with_pairs(recipe, self)

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
        check_cache(self.cache)

    def check(self, recipe: Recipe) -> None:
        """Every teacher makes pairs."""

    def prepare(self, recipe: Recipe, settings: Mapping[str, Any], run_folder: Path) -> Pairs:
        """The pairs of a recipe: read where they were made before, else made and written."""
        folder = Path(self.cache) if self.cache is not None else run_folder / "pairs"
        rest = {"num": self.num, "seed": self.seed, "dtype": str(recipe.networks.dtype)}
        key = key_of(recipe, settings, rest)
        (tensors, seconds), reused = read_or_make(folder, "pairs", key, lambda: self.make(recipe).stored())
        cond = {name.removeprefix("cond."): value for name, value in tensors.items() if name.startswith("cond.")}
        return Pairs(tensors["z"], tensors["x0"], cond, seconds, reused)

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
