"""Laws of training times: values that draw t [B] for a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError, require_positive
from diffdistill.process import NoiseProcess
from diffdistill.rng import Rng
from diffdistill.solvers import karras

MAX_TIMES = 1_000_000  # of a grid that is made at every draw
TimeLaw = Callable[[Rng, NoiseProcess, torch.dtype], Tensor]


@dataclass(frozen=True)
class LogNormal:
    """log(sigma/alpha) ~ N(mean, std^2), clipped to the process's range. Karras et al. 2022, arXiv:2206.00364."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        require_positive(std=self.std)

    def __call__(self, rng: Rng, process: NoiseProcess, dtype: torch.dtype) -> Tensor:
        level = torch.exp(self.mean + self.std * rng.normal((len(rng),), dtype))
        return process.time_at(torch.atan(level))


@dataclass(frozen=True)
class UniformTime:
    """t uniform on the share [low, high] of the process's range."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_share(self.low, self.high)

    def __call__(self, rng: Rng, process: NoiseProcess, dtype: torch.dtype) -> Tensor:
        share = self.low + (self.high - self.low) * rng.uniform((len(rng),), dtype)
        return process.t_min + (process.t_max - process.t_min) * share


@dataclass(frozen=True)
class KarrasIndex:
    """Uniform index on the Karras grid of num_times levels, within the share [low, high] of its ascending order.

    DMD2's law for EDM teachers (arXiv:2405.14867): 1,000 levels, [.02, .98] for the student, all for the critic.
    """

    low: float = 0.0
    high: float = 1.0
    num_times: int = 1000
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_share(self.low, self.high)
        if not 2 <= self.num_times <= MAX_TIMES:
            raise UserError("num_times", f"must lie in 2..{MAX_TIMES}", self.num_times, "The paper uses 1000.")
        require_positive(rho=self.rho)

    def __call__(self, rng: Rng, process: NoiseProcess, dtype: torch.dtype) -> Tensor:
        grid = _karras_levels(process, self.num_times, self.rho, dtype, rng.device)
        first, last = round(self.low * (self.num_times - 1)), round(self.high * (self.num_times - 1))
        return grid[first + rng.integers(last - first + 1, (len(rng),))]


@functools.lru_cache(maxsize=8)  # every draw asks for the same few
def _karras_levels(
    process: NoiseProcess, num_times: int, rho: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The grid in ascending order, [num_times]; not to be written."""
    return torch.tensor(karras(process, num_times - 1, rho)[::-1], dtype=dtype, device=device)


@dataclass(frozen=True)
class KarrasUniform:
    """The Karras interpolation of noise levels at a uniform share of its ascending order, within [low, high].

    SiD's law (arXiv:2404.04057): [0, .8], without a grid.
    """

    low: float = 0.0
    high: float = 1.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_share(self.low, self.high)
        require_positive(rho=self.rho)

    def __call__(self, rng: Rng, process: NoiseProcess, dtype: torch.dtype) -> Tensor:
        low, high = _karras_ends(process, self.rho, rng.device)
        share = self.low + (self.high - self.low) * rng.uniform((len(rng),), dtype)
        return process.time_at(torch.atan((low + (high - low) * share) ** self.rho).to(dtype))


@functools.lru_cache(maxsize=8)
def _karras_ends(process: NoiseProcess, rho: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The noise levels at both ends to the power 1 / rho, float64; not to be written."""
    highest, lowest = karras(process, 1, rho)  # refuses processes that have no such grid
    low, high = process.angle(torch.tensor([lowest, highest], dtype=torch.float64, device=device)).tan() ** (1 / rho)
    return low, high


def _check_share(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise UserError("low, high", "must satisfy 0 <= low < high <= 1", (low, high), "They are shares of the range.")
