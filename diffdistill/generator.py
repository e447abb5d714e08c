"""The student's sampler: what training rolls out, evaluation samples and export ships."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser, FlowMap, SignalMap
from diffdistill.errors import UserError, require_positive
from diffdistill.process import NoiseProcess, expand, wide
from diffdistill.rng import Rng

# (process, x0, x_t, t, s, eps) -> x_s: the next input from the prediction x0 at (x_t, t); eps is unit noise [B, ...]
Renoise = Callable[[NoiseProcess, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# (rng, num_steps, batch) -> which call carries the gradient: one index for all, or one per sample [B]
Until = Callable[[Rng, int, int], "int | Tensor"]
# (process, num_steps) -> num_steps decreasing times, the first at the process's t_max
FewSteps = Callable[[NoiseProcess, int], tuple[float, ...]]


def fresh(process: NoiseProcess, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """Forget the path: x_s = alpha_s x0 + sigma_s eps with new noise (consistency sampling, DMD2)."""
    return process.add_noise(x0, eps, s)


def fresh_from_t_min(process: NoiseProcess, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """As `fresh`, the prediction taken for a sample at t_min: diffusers' CM scheduler, variance s^2 - t_min^2."""
    return process.diffuse(x0, torch.full_like(s, process.t_min), s, eps)


def ddim(process: NoiseProcess, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """Keep the noise that x_t and x0 imply: deterministic."""
    return process.jump(x_t, x0, t, s)


def fixed(process: NoiseProcess, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """Re-noise with the prior noise of the sample at every step (eps is z); deterministic given z."""
    return process.add_noise(x0, eps, s)


def shared_step(rng: Rng, num_steps: int, batch: int) -> int:
    """One uniform k for the whole global batch, equal on all ranks."""
    return int(rng.shared().integers(num_steps, (1,))) if num_steps > 1 else 0


def per_sample_step(rng: Rng, num_steps: int, batch: int) -> Tensor:
    """A uniform k for each sample, [B] int64: all steps run without gradient, then one call with it."""
    return rng.integers(num_steps, (batch,))


def last_step(rng: Rng, num_steps: int, batch: int) -> int:
    """The last call: training on complete samples."""
    return num_steps - 1


def checked_prior(std: float | None) -> float | None:
    """The standard deviation of the first input, refused unless it is positive or None."""
    if std is not None:
        require_positive(**{"distiller.prior_std": std})
    return std


def constant_inputs(sampler: object) -> dict[str, float]:
    """Extra inputs (w, s, step) that do not change while `sampler`, a Generator or a teacher's, samples, by name."""
    student: Any = sampler.student if isinstance(sampler, Generator) else getattr(sampler, "denoiser", None)
    view = student.denoiser if isinstance(student, FlowMap | SignalMap) else student
    found = dict(view.inputs) if isinstance(view, Denoiser) else {}
    if isinstance(sampler, Generator) and len(sampler.times) == 1:
        found["step"] = 0.0
    return found


@dataclass(frozen=True)
class Rollout:
    """One call of the student with gradient, at an input its own sampler made without gradient.

    x_in: [B, *shape] input, detached.  t: [B] its time.  x0: [B, *shape] prediction.  s: [B] the next time (t_min
    after the last step).  k: [B] step index.  next_input: makes x_out.
    """

    x_in: Tensor
    t: Tensor
    x0: Tensor
    s: Tensor
    k: Tensor
    next_input: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def x_out(self) -> Tensor:
        """[B, *shape] the next input (x0 itself after the last step); made when it is asked for first."""
        return self.next_input()


@dataclass(frozen=True)
class Generator:
    """K calls of the student on a grid, re-noised in between.

    times: decreasing, within (t_min, t_max]; times[0] < t_max is legal.  prior_std: the first input is prior_std z;
    None means sigma(times[0]).  few_steps: times for another number of steps; None where the student was trained for
    its own times only.
    """

    student: Denoiser | FlowMap | SignalMap
    times: tuple[float, ...]
    renoise: Renoise = fresh
    prior_std: float | None = None
    few_steps: FewSteps | None = None

    def __post_init__(self) -> None:
        self.student.process.check_times("distiller.times", self.times)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, guidance counted."""
        guidance = self.student.guidance if isinstance(self.student, Denoiser) else None
        return len(self.times) * (1 if guidance is None else guidance.passes)

    def with_steps(self, num_steps: int) -> Generator:
        """The same student with another number of steps, from the same first time.

        Raises UserError where the student was trained for its own times only.
        """
        if num_steps == len(self.times):
            return self
        if self.few_steps is None:
            fix = "Leave it out."
            raise UserError("steps", f"must be {len(self.times)}, what the student was trained for", num_steps, fix)
        within = replace(self.student.process, t_max=self.times[0])
        return replace(self, times=self.few_steps(within, num_steps))

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """Samples [B, *shape] from unit noise z [B, *shape]; rng [B] serves the re-noising."""
        last = len(self.times) - 1
        x, t = self._inputs(z, cond, rng.fork("renoise"), last)
        return self._call(x, t, cond, torch.full_like(t, last, dtype=torch.int64))

    def rollout(self, z: Tensor, cond: Cond, rng: Rng, until: Until) -> Rollout:
        """Run the sampler to call k without gradient and make call k with it; k from `until`.

        The law of x_in given k is that of inference by construction: the same code makes it.
        """
        num_steps, batch = len(self.times), z.shape[0]
        k = until(rng, num_steps, batch)
        noise = rng.fork("renoise")
        if isinstance(k, int):
            with torch.no_grad():
                x_in, t = self._inputs(z, cond, noise, k)
            index = torch.full((batch,), k, dtype=torch.int64, device=z.device)
        else:
            index = k.to(z.device)
            with torch.no_grad():
                x_in, t = self._gather(z, cond, noise, index)
        x0 = self._call(x_in, t, cond, index)
        s_of = _times((*self.times[1:], self.student.process.t_min), t.dtype, t.device)[index]

        def next_input() -> Tensor:
            eps = self._noise(z, noise)
            last = (index == num_steps - 1).view(-1, *[1] * (z.ndim - 1))
            return torch.where(last, x0, self.renoise(self.student.process, x0, x_in, t, s_of, eps))

        return Rollout(x_in, t, x0, s_of, index, next_input)

    def _grid(self, z: Tensor) -> list[Tensor]:
        dtype = wide(z.dtype)
        return [torch.full((z.shape[0],), time, dtype=dtype, device=z.device) for time in self.times]

    def _prior(self, z: Tensor, t: Tensor) -> Tensor:
        std = self.student.process.alpha_sigma(t)[1] if self.prior_std is None else torch.full_like(t, self.prior_std)
        return expand(std, z) * z

    def _noise(self, z: Tensor, rng: Rng) -> Tensor:
        return z if self.renoise is fixed else rng.normal(tuple(z.shape), z.dtype)

    def _call(self, x: Tensor, t: Tensor, cond: Cond, k: Tensor) -> Tensor:
        return self.student.x0(x, t, {**cond, "step": k})

    def _inputs(self, z: Tensor, cond: Cond, rng: Rng, k: int) -> tuple[Tensor, Tensor]:
        """Input and time of call k, by running the k calls before it."""
        grid = self._grid(z)
        x = self._prior(z, grid[0])
        for step in range(k):
            x = self._next(z, x, cond, rng, step, grid)
        return x, grid[k]

    def _gather(self, z: Tensor, cond: Cond, rng: Rng, k: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and times of each sample's call k [B]; the whole batch runs every step."""
        grid = self._grid(z)
        inputs = [self._prior(z, grid[0])]
        for step in range(len(grid) - 1):
            inputs.append(self._next(z, inputs[-1], cond, rng, step, grid))
        here = torch.arange(z.shape[0], device=z.device)
        return torch.stack(inputs)[k, here], torch.stack(grid)[k, here]

    def _next(self, z: Tensor, x: Tensor, cond: Cond, rng: Rng, step: int, grid: list[Tensor]) -> Tensor:
        x0 = self._call(x, grid[step], cond, torch.full_like(grid[step], step, dtype=torch.int64))
        eps = self._noise(z, rng)
        return self.renoise(self.student.process, x0, x, grid[step], grid[step + 1], eps)


@functools.lru_cache(maxsize=8)  # every rollout asks for the same ones
def _times(times: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(times)]; not to be written."""
    return torch.tensor(times, dtype=dtype, device=device)
