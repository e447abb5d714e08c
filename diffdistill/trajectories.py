"""States of the guided teacher's own sampling runs and its predictions there, made once and kept in a cache.

They serve adapter guidance distillation (arXiv:2503.07274), which trains on nothing else: states that guided sampling
visits, not noised data.
"""

from __future__ import annotations

import itertools
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
from diffdistill.distillers.base import Batch, Trajectory
from diffdistill.distillers.guidance.scales import UniformScale, guided_by
from diffdistill.errors import UserError, require_at_least
from diffdistill.generator import constant_inputs
from diffdistill.process import expand, wide
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng


@dataclass(frozen=True)
class Trajectories:
    """x_t, target: [N, S, *shape] states and guided x0 predictions there.  t: [S].  w: [N] scales.  cond: [N, ...] by
    name.  cpu_seconds: what making them took.  reused: from the cache.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor
    w: Tensor
    cond: Mapping[str, Tensor]
    cpu_seconds: float
    reused: bool

    def stored(self) -> Made:
        """As `cached_tensors` keeps it."""
        conds = {f"cond.{name}": value for name, value in self.cond.items()}
        return {"x_t": self.x_t, "target": self.target, "t": self.t, "w": self.w, **conds}, self.cpu_seconds

    def join(self, recipe: Recipe) -> Recipe:
        """The recipe on data that also holds the trajectories."""
        return with_trajectories(recipe, self)

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {"num": len(self.w), "cpu_seconds": round(self.cpu_seconds, 2), "reused": self.reused}


@dataclass(frozen=True)
class TrajectorySource:
    """How many runs of the guided teacher, and where they are kept.

    num: of runs, each with one condition and one w.  num_steps: DDIM steps of a run on the sampler's grid, all stored.
    scales: law of w.  seed: of noise, conditions and scales, which are keyed by the run's index.  batch_size: of the
    teacher's calls.  cache: a folder that runs share, None is the run's own.
    """

    num: int
    num_steps: int
    scales: UniformScale
    seed: int
    batch_size: int
    cache: str | None

    def __post_init__(self) -> None:
        require_at_least(1, num=self.num, num_steps=self.num_steps, batch_size=self.batch_size)
        require_at_least(0, seed=self.seed)
        check_cache(self.cache)

    @property
    def _plain(self) -> bool:
        return self.scales.low == self.scales.high == 1

    def check(self, recipe: Recipe) -> None:
        """Refuse scales for a teacher without a null condition, and samples at a scale that no run has."""
        if (scale := constant_inputs(recipe.distiller.generator).get("w")) is not None:
            self.scales.check("distiller.scale", scale)
        if recipe.networks.teacher.null is None and not self._plain:
            given = [self.scales.low, self.scales.high]
            raise UserError("trajectories.scales", "needs a network with a null condition", given, "Set both to 1.")

    def prepare(self, recipe: Recipe, settings: Mapping[str, Any], run_folder: Path) -> Trajectories:
        """The trajectories of a recipe: read where they were made before, else made and written."""
        folder = Path(self.cache) if self.cache is not None else run_folder / "trajectories"
        rest = {
            "num": self.num, "num_steps": self.num_steps, "scales": [self.scales.low, self.scales.high],
            "seed": self.seed, "dtype": str(recipe.networks.dtype),
        }  # fmt: skip
        key = key_of(recipe, settings, rest)
        (found, seconds), reused = read_or_make(folder, "trajectories", key, lambda: self.make(recipe).stored())
        cond = {name.removeprefix("cond."): value for name, value in found.items() if name.startswith("cond.")}
        return Trajectories(found["x_t"], found["target"], found["t"], found["w"], cond, seconds, reused)

    @torch.no_grad()
    def make(self, recipe: Recipe) -> Trajectories:
        """The trajectories themselves, nothing read or written."""
        started = time.process_time()
        starts = range(0, self.num, self.batch_size)
        ids = (range(first, min(first + self.batch_size, self.num)) for first in starts)
        shown = track(ids, "making trajectories", len(starts), transient=True, disable=not sys.stdout.isatty())
        parts = [self._run(recipe, Rng(self.seed, 0, "trajectories", part, recipe.networks.device)) for part in shown]
        x_t, target, w = (torch.cat(found) for found in zip(*(part[:3] for part in parts), strict=True))
        cond = {name: torch.cat([part[3][name] for part in parts]) for name in parts[0][3]}
        t = torch.tensor(self._times(recipe)[:-1], dtype=wide(x_t.dtype))
        return Trajectories(x_t, target, t, w, cond, time.process_time() - started, reused=False)

    def _run(self, recipe: Recipe, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """States and predictions [B, S, *shape], w [B] and conditions of one batch of runs, on the CPU."""
        data, networks = recipe.data, recipe.networks
        cond = data.conditions(rng.fork("conditions"))
        z = rng.fork("prior").normal((len(rng), *data.shape), networks.dtype)
        dtype = wide(z.dtype)
        w = self.scales(rng.fork("scale"), dtype)
        teacher = networks["teacher"].guided(None) if self._plain else guided_by(networks, "teacher", w)
        grid = [torch.full((len(rng),), time, dtype=dtype, device=z.device) for time in self._times(recipe)]
        x = expand(teacher.process.alpha_sigma(grid[0])[1], z) * z
        states, predictions = [], []
        for t, s in itertools.pairwise(grid):
            x0 = teacher(x, t, cond)
            states.append(x.cpu())
            predictions.append(x0.cpu())
            x = teacher.process.jump(x, x0, t, s)
        conds = {name: value.cpu() for name, value in cond.items()}
        return torch.stack(states, 1), torch.stack(predictions, 1), w.cpu(), conds

    def _times(self, recipe: Recipe) -> tuple[float, ...]:
        return recipe.sampler.grid(recipe.networks["teacher"].process, self.num_steps)


class WithTrajectories:
    """Data whose batches also hold a `Trajectory`, in epochs over all states; every other draw is what it was."""

    def __init__(self, data: Data, stored: Trajectories) -> None:
        self.data, self.stored = data, stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        """As the data's, with `trajectory`."""
        batch, stored = self.data.batch(rng, global_batch, needs, dtype), self.stored
        steps = len(stored.t)
        place = torch.from_numpy(epoch_indices(rng, global_batch, len(stored.w) * steps))
        run, step = place // steps, place % steps
        x_t, target = (part[run, step].to(rng.device, dtype) for part in (stored.x_t, stored.target))
        t, w = stored.t[step].to(rng.device), stored.w[run].to(rng.device)
        cond = {name: value[run].to(rng.device) for name, value in stored.cond.items()}
        return replace(batch, trajectory=Trajectory(x_t, t, target, w, cond))


def with_trajectories(recipe: Recipe, stored: Trajectories) -> Recipe:
    """The recipe on data that also holds the trajectories."""
    return replace(recipe, data=cast("Data", WithTrajectories(recipe.data, stored)))
