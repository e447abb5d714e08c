"""What a student's samples are held against while it trains: fixed noise, fixed conditions, samples of the right law.

Several samples share each condition, so that their spread under one condition can be told from that between conditions.
The right law is the data's where the student is to reproduce them and enough share its conditions; else the teacher's
own sampler is asked once, as it is configured, guidance included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.data import Data
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.evaluation.prdc import exact_distances, neighbour_distances
from diffdistill.process import wide
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng
from diffdistill.solvers import Sampler

VALUES = 2**21  # of data that are looked at
MOST_DATA = 2048
ENOUGH = 8  # data that share a condition
MOST_PER_GROUP = 64
BEYOND = 0.05  # of the data's range, on either side
LEVELS = (0.5, 2.0)  # noise-to-signal ratios in standard deviations, at which conditions are told apart
FITS = 1.1  # times what a straight line leaves, that a network which denoises may leave


@dataclass(frozen=True)
class Known:
    """Different data [m, *shape], flat, and the distance of each to its nearest other one; found once."""

    data: Tensor
    spacing: Tensor

    @staticmethod
    def of(x0: Tensor) -> Known | None:
        """None where there are no two."""
        data = torch.unique(x0.flatten(1).float(), dim=0)
        return Known(data, neighbour_distances(data, 1)[:, 0]) if len(data) > 1 else None

    def memorised(self, samples: Tensor) -> float:
        """As `neighbours.memorised`."""
        distance, nearest = exact_distances(samples.flatten(1).float(), self.data).min(1)
        return float((distance < self.spacing[nearest]).double().mean())


@dataclass(frozen=True)
class Yardstick:
    """z: [G * M, *shape] noise, `groups` rows of M samples under one condition each.  cond: of all of them.
    right: per condition samples of the right law, [m, *shape].  known: data, to tell copies; None where there are none
    or copies mean nothing.
    """

    rng: Rng
    z: Tensor
    cond: Cond
    groups: int
    right: Sequence[Tensor]
    known: Known | None
    of_teacher: bool

    @property
    def std(self) -> float:
        """Of the right law, all conditions together."""
        return float(torch.sqrt(self._moments(self.right)[1]))

    def samples(self, sampler: Sampler) -> Tensor:
        """[G * M, *shape], the same draw at every call."""
        return drawn(sampler, self.z, self.cond, self.rng)

    def figures(self, samples: Tensor) -> dict[str, float]:
        """What the samples are like, each figure relative to the right law."""
        broken = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
        if broken:
            return {"nonfinite": float(broken)}
        ours = list(samples.float().chunk(self.groups))
        (mean, var, within), (mean0, var0, within0) = self._moments(ours), self._moments(self.right)
        apart = (mean - mean0).flatten(1).square().mean(1)
        # the means of so few samples differ by chance: what that is worth is taken off
        chance = within / (len(ours[0])) + sum(within_of(r) / len(r) for r in self.right) / len(self.right)
        std = float(torch.sqrt(var0))
        every = torch.cat(list(self.right))
        low, high = float(every.min()), float(every.max())
        room = BEYOND * (high - low)
        out = (samples < low - room) | (samples > high + room)
        figures = {
            "nonfinite": 0.0,
            "mean": math.sqrt(max(0.0, float(apart.mean() - chance))) / std,
            "std": math.sqrt(float(var)) / std,
            "spread": math.sqrt(float(within / within0)),
            "saturated": float(out.float().mean()),
            "distance": sum(map(energy, ours, self.right)) / self.groups / (std * math.sqrt(samples[0].numel())),
        }
        if self.known is not None:
            figures["memorised"] = self.known.memorised(samples)
        return figures

    @staticmethod
    def _moments(groups: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of each condition, [G, *shape]; variance per value over all, conditions alike; that under one."""
        means = torch.stack([group.float().mean(0) for group in groups])
        within = sum(within_of(group) for group in groups) / len(groups)
        between = means.var(0, unbiased=False).mean() if len(groups) > 1 else torch.zeros(())
        return means, within + between, within  # type: ignore[return-value]


def within_of(group: Tensor) -> Tensor:
    """Variance per value of samples [m, *shape], a scalar."""
    return group.float().var(0).mean()


def energy(ours: Tensor, right: Tensor) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| of samples, each pair of different ones."""
    x, y = ours.flatten(1).float(), right.flatten(1).float()
    own = [torch.cdist(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - own[0] - own[1])


def drawn(sampler: Sampler, z: Tensor, cond: Cond, rng: Rng, at_once: int = 64) -> Tensor:
    """Samples from noise z, some at a time, which does not change them."""
    parts = []
    for first in range(0, len(z), at_once):
        rows = slice(first, first + at_once)
        part = {key: value[rows] for key, value in cond.items()}
        some = Rng(rng.seed, rng.step, rng.phase, rng.ids[rows], rng.device)
        parts.append(sampler.sample(z[rows], part, some.fork("sampler")))
    return torch.cat(parts)


def sizes(num: int) -> tuple[int, int]:
    """(conditions, samples of each) of about `num` samples."""
    each = 2 ** max(2, int(math.log2(max(num, 1)) / 2))
    return max(1, num // each), each


def yardstick(recipe: Recipe, num: int, seed: int) -> Yardstick:
    """Draw and choose what `num` samples are held against."""
    data, networks = recipe.data, recipe.networks
    groups, each = sizes(num)
    conditions = Rng(seed, 0, "health", range(groups), networks.device).fork("conditions")
    few = {key: value.to(networks.device) for key, value in data.conditions(conditions).items()}
    cond = {key: value.repeat_interleave(each, 0) for key, value in few.items()}
    rng = Rng(seed, 0, "health", range(groups * each), networks.device)
    z = rng.fork("prior").normal((groups * each, *data.shape), networks.dtype)
    x0, known = data_and_conditions(data, rng, networks.dtype)
    sorted_ = None if x0 is None or networks["teacher"].guidance is not None else _sorted(x0, known, few, groups)
    copies = None if x0 is None or len(data.shape) < 2 else Known.of(x0)
    if sorted_ is not None:
        return Yardstick(rng, z, cond, groups, sorted_, copies, False)
    made = drawn(recipe.sampler, z, cond, rng.fork("teacher")).float()
    return Yardstick(rng, z, cond, groups, made.chunk(groups), copies, True)


def data_and_conditions(data: Data, rng: Rng, dtype: torch.dtype) -> tuple[Tensor | None, Cond]:
    """Data [n, *shape] and their conditions; None where there are none of the generator's shape."""
    if "x0" not in data.provides:
        return None, {}
    num = max(16, min(MOST_DATA, VALUES // math.prod(data.shape)))
    batch = data.batch(Rng(rng.seed, 0, "health data", range(num), rng.device), num, frozenset({"x0"}), dtype)
    if batch.x0 is None or tuple(batch.x0.shape[1:]) != tuple(data.shape):
        return None, {}
    return batch.x0, batch.cond


def _sorted(x0: Tensor, cond: Cond, few: Cond, groups: int) -> list[Tensor] | None:
    """The data of each condition; None if one has too few."""
    found = []
    for group in range(groups):
        same = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
        for key, value in few.items():
            same &= (
                (cond[key].to(x0.device) == value[group]).flatten(1).all(1)
                if value.ndim > 1
                else (cond[key].to(x0.device) == value[group])
            )
        if int(same.sum()) < ENOUGH:
            return None
        found.append(x0[same][:MOST_PER_GROUP].float())
    return found


@torch.no_grad()
def heeded(denoiser: Denoiser, x0: Tensor, cond: Cond, other: Cond, std: float, rng: Rng) -> dict[str, float]:
    """How far samples belong to their conditions, in the eyes of a denoiser.

    For samples of the law that it denoises, an exact D satisfies E|x0 - D(other)|^2 - E|x0 - D(own)|^2 =
    E|D(other) - D(own)|^2: the quotient, `slope`, is 1. It is 0 or less where conditions belong to other samples.
    doubt: two standard errors of it. left: residual relative to a straight line's; left_other: under the others.
    """
    process = denoiser.process
    gains, apart, own, line = [], [], [], 0.0
    for index, level in enumerate(LEVELS):
        t = process.time_at(torch.full((len(x0),), math.atan(level * std), dtype=torch.float64)).to(
            device=x0.device, dtype=wide(x0.dtype)
        )
        x_t = process.add_noise(x0, rng.fork(f"level {index}").normal(tuple(x0.shape), x0.dtype), t)
        ours, theirs = denoiser(x_t, t, cond), denoiser(x_t, t, other)
        first, second = ((d - x0).flatten(1).square().mean(1) for d in (ours, theirs))
        gains.append(second - first)
        own.append(first)
        apart.append((ours - theirs).flatten(1).square().mean(1))
        line += std**2 * level**2 / (1 + level**2)
    gain, differ = torch.stack(gains).sum(0).double(), torch.stack(apart).sum(0).double()
    left = float(torch.stack(own).sum(0).mean()) / line
    if float(differ.sum()) <= 0:
        return {"left": left}
    other_left = left + float(gain.mean()) / line
    slope = float(gain.sum() / differ.sum())
    doubt = 2 * float((gain - slope * differ).square().sum().sqrt() / differ.sum())
    return {"slope": slope, "doubt": doubt, "left": left, "left_other": other_left}
