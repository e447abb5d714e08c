"""Small pictures of a run, kept in its folder as tensors: samples from the same noise over training, and the teacher's
beside the student's with what either thinks x0 is at each step. The report is made of them, without any network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill import ranks
from diffdistill.data import Data, seen
from diffdistill.denoiser import Cond
from diffdistill.evaluation import harness
from diffdistill.generator import Generator
from diffdistill.networks.roles import Networks
from diffdistill.pictures import as_colours, columns_of, shown_classes, where
from diffdistill.process import X0, Kind
from diffdistill.recipe import Recipe
from diffdistill.solvers import OdeSampler, Sampler

SCHEMA = 1  # of the files
FOLDER = "samples/small"
LOOKS = 10  # over training, evenly spaced
APART = 20  # steps between two looks, at least
SIDE = 64  # pixels of a picture; larger ones are averaged down
FRAMES = 6  # of a clip
POINTS = 400
MOST_REFERENCE = 400
ESTIMATES = 8  # of a sampler's steps


def spacing(steps: int) -> int:
    """Steps between two looks of a run of so many."""
    return max(APART, -(-steps // LOOKS))


def num_small(data: Data) -> int:
    """How many samples are drawn: few where one costs much."""
    if len(data.shape) < 2:
        return POINTS
    if len(data.shape) != 3 or getattr(data, "codec", None) is not None or max(data.shape[1:]) > SIDE:
        return 4 if len(data.shape) < 4 else 2
    return 2 * columns_of(data)


def small(samples: Tensor) -> Tensor:
    """What is kept of samples [n, *shape] in [-1, 1]: points as float32 [n, d], pictures as uint8 [n, 1 or 3, H, W]
    with sides of at most 64, clips as uint8 [n, 1 or 3, T, H, W] of at most 6 frames. What is not finite is black."""
    if samples.ndim == 2:
        return samples.detach().float().cpu()
    if samples.ndim == 3 or samples.shape[1] not in (1, 3):
        samples = as_colours(samples)
    if samples.ndim == 5:
        chosen = torch.linspace(0, samples.shape[2] - 1, min(FRAMES, samples.shape[2])).round().long()
        frames = samples[:, :, chosen.to(samples.device)]
        flat = small(frames.transpose(1, 2).flatten(0, 1))
        return flat.unflatten(0, (len(samples), len(chosen))).transpose(1, 2).contiguous()
    values = samples.detach().float().cpu().nan_to_num(-1, 1, -1).clamp(-1, 1)
    factor = max(values.shape[-2:]) / SIDE
    if factor > 1:
        size = [max(1, round(side / factor)) for side in values.shape[-2:]]
        values = nn.functional.interpolate(values, size=size, mode="area")
    return values.add(1).mul(127.5).round().to(torch.uint8)


def keep_step(folder: Path, step: int, data: Data, sampler: Sampler, networks: Networks) -> None:
    """Draw from the fixed noise and keep what came, as of `step`."""
    num = num_small(data)
    drawn, _ = harness.draw(sampler, data, num, 0, num, *where(networks), shown_classes(data, num))
    finite = bool(torch.isfinite(drawn).all())
    if ranks.is_main():
        _write(folder / FOLDER / f"step-{step:08d}.safetensors", {"samples": small(drawn)}, {"finite": finite})


@dataclass(frozen=True)
class Estimates:
    """Of a sampler. samples: [n, ...].  x0: [K, n, ...], at `times` of its process, highest first; None where it
    cannot be looked into.  nfe: network evaluations per sample."""

    samples: Tensor
    x0: Tensor | None
    times: tuple[float, ...]
    nfe: int

    def caption(self, name: str) -> str:
        return f"{name}, {self.nfe} evaluation{'s' if self.nfe != 1 else ''}"


@dataclass(frozen=True)
class SameNoise:
    """Teacher and student from the same noise and conditions. step: of the student.  columns: of a grid, where there
    is one.  reference: real points [m, d], None where samples are no points.  decoded: whether latents are shown as
    pictures; None where samples are what they are.
    """

    teacher: Estimates
    student: Estimates
    step: int
    columns: int
    reference: Tensor | None
    decoded: bool | None


def same_noise(step: int, recipe: Recipe) -> SameNoise:
    """Draw the teacher and the student, which has taken `step` steps."""
    data = recipe.data
    teacher, student = (
        _estimates(sampler, data, recipe.networks) for sampler in (recipe.sampler, recipe.distiller.generator)
    )
    has_codec = getattr(data, "codec", None) is not None
    latent = has_codec or (len(data.shape) > 1 and data.shape[0] not in (1, 3))
    reference = data.reference().data[:MOST_REFERENCE].float() if len(data.shape) == 1 else None
    return SameNoise(teacher, student, step, columns_of(data), reference, has_codec if latent else None)


def keep_same_noise(folder: Path, found: SameNoise) -> None:
    tensors = {} if found.reference is None else {"reference": found.reference}
    told: dict[str, Any] = {"step": found.step, "columns": found.columns, "decoded": found.decoded}
    for name, of in (("teacher", found.teacher), ("student", found.student)):
        tensors[name] = of.samples
        if of.x0 is not None:
            tensors[f"{name}_x0"] = of.x0
        told |= {f"{name}_times": of.times, f"{name}_nfe": of.nfe}
    _write(folder / FOLDER / "same_noise.safetensors", tensors, told)


def _estimates(sampler: Sampler, data: Data, networks: Networks) -> Estimates:
    samples, found = with_estimates(sampler, data, num_small(data), networks)
    times = sorted(found, reverse=True)
    chosen = torch.linspace(0, len(times) - 1, min(ESTIMATES, len(times))).round().long().tolist()
    shown = tuple(times[index] for index in chosen)
    x0 = torch.stack([small(found[time]) for time in shown]) if shown else None
    return Estimates(small(samples), x0, shown, sampler.nfe)


def with_estimates(sampler: Sampler, data: Data, num: int, networks: Networks) -> tuple[Tensor, dict[float, Tensor]]:
    """num samples, and by time the estimate of x0 that the sampler went on from; both decoded where the data can.

    No estimates come from samplers that are neither a Generator nor a solver of an ODE.
    """
    notes: dict[float, Tensor] = {}
    watched: Any = sampler
    if isinstance(sampler, Generator):
        student: Any = Noting(sampler.student, notes)
        watched = replace(sampler, student=student)
    elif isinstance(sampler, OdeSampler):
        denoiser: Any = Noting(sampler.denoiser, notes)
        watched = replace(sampler, denoiser=denoiser)
    with torch.no_grad():
        samples, _ = harness.draw(watched, data, num, 0, num, *where(networks), shown_classes(data, num))
        return samples, {time: seen(data, x0.float()).cpu() for time, x0 in notes.items()}


class Noting:
    """A view of a network that notes, by time, the x0 behind what it answers. The last answer at a time stands: of
    Heun's two there, the one at the state that the step ended in."""

    def __init__(self, view: Any, notes: dict[float, Tensor]) -> None:
        self._view, self._notes = view, notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self._noted(t, self._view(x_t, t, cond))

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self._noted(t, self._view.x0(x_t, t, cond))

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond, kind: Kind) -> Tensor:
        answer: Tensor = self._view.predict(x_t, t, cond, kind)
        self._noted(t, self._view.process.convert(answer, x_t, t, kind, X0))
        return answer

    def _noted(self, t: Tensor, x0: Tensor) -> Tensor:
        self._notes[float(t[0])] = x0.detach()
        return x0


@dataclass(frozen=True)
class Look:
    """What was kept of a step. finite: whether all values were, before they became pixels."""

    samples: Tensor
    finite: bool


def kept_steps(folder: Path) -> dict[int, Look]:
    """What was kept by step, in order; what cannot be read is left out, and counted by `num_damaged`."""
    read = {int(path.stem.removeprefix("step-")): _read(path) for path in _step_files(folder)}
    return {step: Look(found[0]["samples"], found[1]["finite"]) for step, found in read.items() if found is not None}


def num_damaged(folder: Path) -> int:
    """How many of the files of samples cannot be read, or are of another schema."""
    return sum(_read(path) is None for path in _step_files(folder))


def _step_files(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("step-*.safetensors"))


def kept_same_noise(folder: Path) -> SameNoise | None:
    """What was kept of teacher and student; None if nothing was."""
    content = _read(folder / FOLDER / "same_noise.safetensors")
    if content is None:
        return None
    tensors, told = content
    teacher, student = (
        Estimates(tensors[name], tensors.get(f"{name}_x0"), tuple(told[f"{name}_times"]), told[f"{name}_nfe"])
        for name in ("teacher", "student")
    )
    return SameNoise(teacher, student, told["step"], told["columns"], tensors.get("reference"), told["decoded"])


def _write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, aside, {"told": json.dumps({"schema": SCHEMA, **told})})
    aside.replace(path)  # whole or not at all


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["told"])
            if told["schema"] != SCHEMA:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
