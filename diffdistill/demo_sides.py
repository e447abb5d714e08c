"""What the demo draws from: a diffusers pipeline, or a teacher that is no pipeline, under the seed of a visitor.

Teacher and student get the same noise: a pipeline takes it from a torch.Generator of the visitor's seed, and
`export_check.TorchDraws` takes it from the same one for a teacher of this package.
"""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffdistill import config_files
from diffdistill.config import build, compose
from diffdistill.config_errors import first_line
from diffdistill.denoiser import Denoiser, Guidance
from diffdistill.errors import UserError
from diffdistill.export_check import TorchDraws
from diffdistill.networks.diffusers import UNet2D
from diffdistill.networks.files import resolve
from diffdistill.pipelines import DENOISERS, PipelineSampler
from diffdistill.solvers import OdeSampler

SIZES = ("height", "width", "num_frames")  # keywords of a call that decide the shape of its noise
MOST_CALLS = 5  # that are timed for one figure
ENOUGH_SECONDS = 0.5  # of them together, after which there is no other


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for. seed: of the noise.  num: of samples.  label: the class, None is each in turn.

    prompt: for what is told in words.  steps, guidance: None is what the sampler was made for.
    """

    seed: int
    num: int
    label: int | None = None
    prompt: str = ""
    steps: int | None = None
    guidance: float | None = None

    def labels(self, num_classes: int) -> Tensor:
        """The classes of its samples, [num] int64."""
        return torch.arange(self.num) % num_classes if self.label is None else torch.full((self.num,), self.label)


@dataclass(frozen=True)
class Choices:
    """What a sampler leaves to its visitor.

    num_classes: 0 without classes.  words: whether it is told in words; prompts: ones it knows.  steps, guidance: what
    they are at first; None where they are fixed.
    """

    num_classes: int = 0
    words: bool = False
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    guidance: float | None = None


class Side(Protocol):
    """One of the two on the page."""

    @property
    def choices(self) -> Choices: ...
    @property
    def networks(self) -> tuple[nn.Module, ...]: ...
    @property
    def device(self) -> torch.device: ...

    def draw(self, wish: Wish) -> Tensor:
        """Images [num, C, H, W] or clips [num, C, T, H, W] in [0, 1]."""
        ...


@dataclass(frozen=True)
class PipelineSide:
    """A diffusers pipeline, called as its call.json says; without one, steps and guidance are the visitor's.

    sizes: keywords of the call, of those in SIZES.
    """

    sampler: PipelineSampler
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def choices(self) -> Choices:
        takes = inspect.signature(self.sampler.pipeline.__call__).parameters
        free = {} if self.sampler.settled else {name: takes[name].default for name in takes}
        steps, guidance = free.get("num_inference_steps"), free.get("guidance_scale")
        return Choices(
            self._num_classes() if "class_labels" in takes else 0,
            "prompt" in takes,
            tuple(prompt for prompt in self.sampler.prompts if prompt),
            steps if isinstance(steps, int) else None,
            float(guidance) if isinstance(guidance, int | float) else None,
        )

    def _num_classes(self) -> int:
        configs: list[Any] = [network.config for network in self.networks if hasattr(network, "config")]
        found = [config.get(name) for config in configs for name in ("num_class_embeds", "num_embeds_ada_norm")]
        return int(next(filter(None, found), 0))

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        parts = (getattr(self.sampler.pipeline, name, None) for name in DENOISERS)
        return tuple(part for part in parts if isinstance(part, nn.Module))

    @property
    def device(self) -> torch.device:
        return torch.device(self.sampler.pipeline.device)

    def draw(self, wish: Wish) -> Tensor:
        choices = self.choices
        inputs: dict[str, Any] = dict(self.sizes)
        if choices.words:
            inputs["prompt"] = [wish.prompt] * wish.num
        elif "batch_size" in inspect.signature(self.sampler.pipeline.__call__).parameters:
            inputs["batch_size"] = wish.num
        if choices.num_classes:
            inputs["class_labels"] = wish.labels(choices.num_classes).tolist()
        if choices.steps is not None and wish.steps is not None:
            inputs["num_inference_steps"] = wish.steps
        if choices.guidance is not None and wish.guidance is not None:
            inputs["guidance_scale"] = wish.guidance
        return self.sampler.made(inputs, torch.Generator().manual_seed(wish.seed)).float().cpu().clamp(0, 1)


@dataclass(frozen=True)
class DenoiserSide:
    """A UNet2DModel that is no pipeline, such as the digits teacher, sampled by its own solver and grid."""

    sampler: OdeSampler
    network: UNet2D

    @property
    def choices(self) -> Choices:
        num_classes = self.network.num_classes - (self.network.null is not None)
        guidance = None if self.network.null is None else 1.0
        return Choices(num_classes, steps=len(self.sampler.times) - 1, guidance=guidance)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.network,)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def draw(self, wish: Wish) -> Tensor:
        sampler, choices = self.sampler, self.choices
        if wish.steps is not None:
            sampler = sampler.with_steps(wish.steps)
        if wish.guidance is not None and self.network.null is not None:
            guided = sampler.denoiser.guided(Guidance(wish.guidance, self.network.null))
            sampler = replace(sampler, denoiser=guided)
        config = self.network.unet.config
        draws: Any = TorchDraws(wish.seed, self.device)
        z = draws.normal((wish.num, config.in_channels, config.sample_size, config.sample_size), torch.float32)
        labels = {"label": wish.labels(choices.num_classes).to(self.device)} if choices.num_classes else {}
        return sampler.sample(z, labels, draws).float().cpu().add(1).div(2).clamp(0, 1)


# --- loading


def load_student(pipeline: str) -> PipelineSide:
    """The student's side. Raises UserError if `pipeline` is no whole pipeline that makes pictures."""
    return PipelineSide(PipelineSampler.load(str(resolve(pipeline))))


def load_teacher(teacher: str, student: PipelineSide) -> Side:
    """The teacher's side, for samples of the student's size.

    teacher: a pipeline folder, hub id or asset:NAME, or the folder of a UNet2DModel as runs write teachers.
    Raises UserError if it is neither.
    """
    place = Path(resolve(teacher))
    if place.is_dir() and not (place / "model_index.json").is_file():
        return _denoiser(teacher, place, student.choices.num_classes)
    if teacher.startswith("asset:") and not place.is_dir():
        known = sorted(path.name for path in place.parent.iterdir() if path.is_dir())
        raise UserError(
            "teacher", f"must be one of {', '.join(f'asset:{name}' for name in known)}", teacher, "Mend it."
        )
    try:
        sampler = PipelineSampler.load(str(place) if teacher.startswith("asset:") else teacher)
    except UserError as error:
        raise UserError("teacher", error.constraint, error.value, error.fix) from error
    takes = inspect.signature(sampler.pipeline.__call__).parameters
    told = {name: student.sampler.call[name] for name in SIZES if name in student.sampler.call and name in takes}
    return PipelineSide(sampler, {} if sampler.settled else told)


def _denoiser(teacher: str, place: Path, num_classes: int) -> DenoiserSide:
    """A UNet2DModel with the process that its networks configuration tells."""
    config = place / "config.json"
    try:
        found = json.loads(config.read_text())
        rows, kind = int(found.get("num_class_embeds") or 0), found.get("_class_name")
    except (OSError, ValueError, AttributeError, TypeError):
        rows, kind = 0, None
    if kind != "UNet2DModel":
        fix = "Give a pipeline folder, a hub id, asset:digits, or the folder of a teacher's run/pipeline."
        raise UserError("teacher", "must hold a diffusers pipeline or a UNet2DModel", teacher, fix)
    name = teacher.removeprefix("asset:")
    own = teacher.startswith("asset:") and name in config_files.groups()["networks"]
    null = str(rows > num_classes).lower()
    words = [f"networks={name}"] if own else ["networks=unet2d", "networks.path=given", f"networks.has_null={null}"]
    settings = compose("train", [*words, "run_dir=none"])
    settings.networks.path = teacher
    try:
        network = build(settings.networks)
    except UserError as error:
        raise UserError("teacher", error.constraint, error.value, error.fix) from error
    network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return DenoiserSide(build(settings.sampler, denoiser=Denoiser(network)), network)


# --- drawing and measuring


@dataclass(frozen=True)
class Made:
    """What one call made. images: [num, C, H, W] or [num, C, T, H, W] in [0, 1].  nfe: network evaluations per
    sample, counted.  milliseconds: of a call, from the seed to values on the CPU, median of `calls`."""

    images: Tensor
    nfe: float
    milliseconds: float
    calls: int


class Measured:
    """A side whose calls are counted and timed. The first call with each number of samples goes untimed, those that
    take little are repeated."""

    def __init__(self, name: str, side: Side) -> None:
        self.name, self.side = name, side
        self._warm: set[int] = set()

    def make(self, wish: Wish) -> Made:
        if wish.num not in self._warm:  # memory is laid out and kernels are chosen
            self.side.draw(wish)
            self._warm.add(wish.num)
        spent: list[float] = []
        with _evaluations(self.side.networks) as count:
            while len(spent) < MOST_CALLS and sum(spent) < ENOUGH_SECONDS:
                started = time.perf_counter()
                images = self.side.draw(wish)
                spent.append(time.perf_counter() - started)
        return Made(images, count[0] / wish.num / len(spent), 1000 * statistics.median(spent), len(spent))


@contextmanager
def _evaluations(networks: tuple[nn.Module, ...]) -> Iterator[list[int]]:
    """Within the context, how many samples the networks were called on, all calls together."""
    count = [0]

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        count[0] += next(
            len(value) for value in (*args, *keywords.values()) if isinstance(value, Tensor) and value.ndim
        )

    hooks = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def check_pair(student: Side, teacher: Side | None) -> Wish:
    """Run both once, so that what does not fit is told before anybody looks; returns what was asked of them.

    Raises UserError if a side makes no pictures, or the two are told different things or make other sizes.
    """
    choices = student.choices
    wish = Wish(0, 1, prompt=next(iter(choices.prompts), ""))
    made = _tried("pipeline", student, wish)
    if teacher is None:
        return wish
    told = teacher.choices
    if told.words != choices.words or told.num_classes != choices.num_classes:
        constraint = f"must be told what the student is told, {_told(choices)}"
        raise UserError("teacher", constraint, f"one of {_told(told)}", "Name the teacher it was distilled from.")
    theirs = _tried("teacher", teacher, wish)
    if theirs.shape != made.shape:
        constraint = f"must make samples of the student's shape {list(made.shape[1:])}"
        raise UserError("teacher", constraint, list(theirs.shape[1:]), "Name the teacher it was distilled from.")
    return wish


def _told(choices: Choices) -> str:
    return "words" if choices.words else f"{choices.num_classes} classes" if choices.num_classes else "nothing"


def _tried(key: str, side: Side, wish: Wish) -> Tensor:
    try:
        made = side.draw(wish)
    except UserError as error:
        raise UserError(key, error.constraint, error.value, error.fix) from error
    except AttributeError as error:  # of sound, say
        raise UserError(
            key, "must make pictures or clips", first_line(error), "The demo shows nothing else."
        ) from error
    if made.ndim not in (4, 5):
        raise UserError(key, "must make pictures or clips", f"samples {list(made.shape[1:])}", "It shows nothing else.")
    return made
