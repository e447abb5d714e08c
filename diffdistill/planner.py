"""The verb plan: what a recipe takes before anything is run, whether it fits a device, and what makes it fit.

It composes a `train` configuration, runs the steps of one of its cycles without values, and reads off what is live and
what is computed. A family whose pipeline is not named is planned at the size of a published model.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from diffdistill.config import build, compose, gathered, override
from diffdistill.config_files import groups, text
from diffdistill.config_types import did_you_mean
from diffdistill.errors import UserError, require_at_least
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.families.words import latent_factors
from diffdistill.networks.files import resolve
from diffdistill.rehearsal import Rehearsal, rehearse
from diffdistill.run_folder import new_file, writing
from diffdistill.shapes_only import ACTIVATIONS, GRADIENTS
from diffdistill.stand_in import stand_in

SCHEMA = 1
GIB = 2**30
UNITS = {"GiB": GIB, "GB": 10**9, "MiB": 2**20, "MB": 10**6}
# the published model whose shapes are planned where networks.path is not given, by the config in configs/networks
SIZES = {"wan": "wan_1_3b", "cogvideox": "cogvideox_2b", "pixart": "pixart_sigma"}
CLIP, PICTURE = (480, 832), (1024, 1024)  # height and width, where neither data nor model have them
FRAMES = 81
MOST_DEVICES = 1024
FILL = "FILL_IN"  # for data of which only shapes matter here
OWN = ("device_memory", "devices", "device_rate", "size", "frames", "out", "overrides")


@dataclass(frozen=True)
class Step:
    """A recipe after one change more. what: the change, in words.  words: overrides of train, all from the first on;
    own: those of this change."""

    what: str
    words: tuple[str, ...]
    devices: int
    found: Rehearsal
    own: tuple[str, ...] = ()


def plan(
    device_memory: str | float | None,
    devices: int,
    device_rate: float | Literal["measure"] | None,
    size: tuple[int, int] | None,
    frames: int | None,
    out: str | None,
    overrides: tuple[str, ...],
) -> dict[str, Any]:
    """Print and return what a recipe takes; with device_memory, whether it fits and what makes it fit.

    device_memory: of one device, "24GiB" or a number of GiB.  devices: over which weights, gradients, optimizers and
    averages are sharded evenly.  device_rate: TFLOP/s that a device reaches; measure: on this machine.  size, frames:
    of samples in pixels, in place of the data's.  out: JSON file.  overrides: of train.
    """
    limit = None if device_memory is None else _bytes_of(device_memory)
    require_at_least(1, devices=devices, frames=1 if frames is None else frames)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError("size", "must be two numbers >= 1, height and width", list(size), "Mend it.")
    if out is not None:
        new_file("out", out)
    rate = _rate(device_rate)
    words, fill = completed(overrides)
    recipe = _Planned([*words, *fill], size, frames)
    first = Step("as it is", (), devices, recipe.rehearse((), devices))
    steps = [first, *(() if limit is None else _smaller(recipe, first, limit))]
    report = _report(steps, words, limit, rate)
    _print(report, steps, fill)
    if out is not None:
        with writing(out, "out", "Name another place, or make room."):
            Path(out).write_text(json.dumps(report, indent=1) + "\n")
    return report


class _Planned:
    """A train configuration whose steps can be rehearsed with some more overrides."""

    def __init__(self, words: Sequence[str], size: tuple[int, int] | None, frames: int | None) -> None:
        self.words, self.size, self.frames = list(words), size, frames

    def settings(self, more: Sequence[str]) -> DictConfig:
        return compose("train", [*self.words, *more, "run_dir=none"])

    def rehearse(self, more: Sequence[str], devices: int) -> Rehearsal:
        settings = self.settings(more)
        with torch.device("meta"):
            teacher = build(settings["networks"])
        data = self._data(settings, teacher)
        dense = {str(key): settings[key] for key in settings} | {"attention": {}}  # masks save operations, not memory
        lowered = settings["precision"] != "fp32"  # the default on CUDA
        return rehearse(dense, data, teacher, devices, lowered)

    def _data(self, settings: Mapping[str, Any], teacher: Any) -> Any:
        """The configuration's own data; for text, what has the shapes it would have."""
        node = settings["data"]
        if node.get("path") != FILL:
            data = build(node)
            if not hasattr(data, "told"):
                return data
        if not isinstance(teacher, Stock):
            fix = "Use networks=sd15, sdxl, flux, wan, ..."
            raise UserError("data", "prompts need a network that reads text", type(teacher).__name__, fix)
        size = self.size or node.get("size")
        if size is None and teacher.model.config.get("sample_size") is None:
            size = CLIP if teacher.dims == 4 else PICTURE
        frames = self.frames or node.get("frames") or FRAMES
        size = None if size is None else (int(size[0]), int(size[1]))
        return stand_in(teacher, size, int(frames), latent_factors(str(settings["networks"]["path"])))


def completed(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A train command line, and what is taken in place of what it leaves open: a pipeline, and data of it.

    Where a family and a method are named without an experiment, the method's recipe for text is taken.
    """
    given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words}
    family, method, known = given.get("networks", ""), given.get("distiller", ""), groups()
    if family and family not in known["networks"]:
        fix = did_you_mean(family, known["networks"])
        raise UserError("networks", "must name an option of the group networks", family, fix)
    own, fill = list(words), list[str]()
    size = f"asset:sizes/{SIZES.get(family, family)}"
    if "path: ???" not in text(f"networks/{family}") or not Path(resolve(size)).is_dir():
        return own, fill
    if "networks.path" not in given:
        fill.append(override("networks.path", size))
    if "experiment" in given or "data" in given:
        told = str(given.get("experiment")).startswith("t2i_") or given.get("data") in ("prompts", "latents")
    else:
        told = True
        if not _reads_text(family, given.get("networks.path", size)):
            own += ["data=latents", "evaluation=none"]
        elif f"t2i_{method}" in known["experiment"]:
            own = [f"experiment=t2i_{method}", *(word for word in own if word != f"distiller={method}")]
        else:
            own += ["data=prompts", "evaluation=none"]
    if told and "data.path" not in given:
        fill.append(f"data.path={FILL}")
    return own, fill


def _reads_text(family: str, path: str) -> bool:
    words = [f"networks={family}", override("networks.path", path), "data=gmm2d", "run_dir=none"]
    with torch.device("meta"):
        return "text" in build(compose("train", words)["networks"]).needs


def _smaller(recipe: _Planned, start: Step, limit: int) -> Iterator[Step]:
    """Changes of the recipe, each on top of those before, until it fits: those that leave its results alone first."""
    step, taken = start, list[Step]()
    for change in (_checkpointing, _split, _half, _adapters, _shards):
        if step.found.bytes <= limit:
            break
        changed = change(recipe, step, limit)
        if changed is not None:
            step = replace(changed, own=changed.words[len(step.words) :])
            taken.append(step)
            yield step
    if step.found.bytes > limit:
        return
    for needless in taken[:-1]:  # what a later change made needless
        words = tuple(word for word in step.words if word not in needless.own)
        found = recipe.rehearse(words, step.devices)
        if found.bytes <= limit:
            step = Step(f"without {needless.what}", words, step.devices, found)
            yield step


def _checkpointing(recipe: _Planned, step: Step, limit: int) -> Step | None:
    settings = recipe.settings(step.words)
    with torch.device("meta"):
        backbone = getattr(build(settings["networks"]), "backbone", None)
    if settings["checkpointing"] or not getattr(backbone, "_supports_gradient_checkpointing", False):
        return None
    words = (*step.words, "checkpointing=true")
    return Step("checkpointing", words, step.devices, recipe.rehearse(words, step.devices))


def _split(recipe: _Planned, step: Step, limit: int) -> Step | None:
    """The largest micro-batch that fits, in more of them; bytes are affine in its size."""
    trainer = recipe.settings(step.words)["trainer"]
    batch, accumulate = int(trainer["batch_size"]), int(trainer["accumulate"])
    if batch == 1:
        return None

    def at(size: int) -> Step:
        words = (*step.words, f"trainer.batch_size={size}", f"trainer.accumulate={accumulate * batch // size}")
        return Step(f"micro-batches of {size}", words, step.devices, recipe.rehearse(words, step.devices))

    least = at(1)
    if least.found.bytes >= step.found.bytes:
        return None
    each = (step.found.bytes - least.found.bytes) / (batch - 1)
    fitting = [n for n in range(2, batch) if batch % n == 0 and least.found.bytes + (n - 1) * each <= 0.98 * limit]
    return at(fitting[-1]) if fitting else least


def _half(recipe: _Planned, step: Step, limit: int) -> Step | None:
    if recipe.settings(step.words)["precision"] != "fp32":
        return None
    words = (*step.words, "precision=bf16")
    return Step("bfloat16 where autocast uses it", words, step.devices, recipe.rehearse(words, step.devices))


def _adapters(recipe: _Planned, step: Step, limit: int) -> Step | None:
    """LoRA in place of copies, where the method takes it."""
    part = build(recipe.settings(step.words)["distiller"])
    roles = part.func.roles(**part.keywords)
    copies = [found.role for found in step.found.parts if found.mode == "copy" and found.role in roles]
    words = [f"roles.{role}=lora" for role in copies if "lora" in roles[role].modes and roles[role].ema_of is None]
    if not words:
        return None
    words = [*step.words, *words]
    return Step("LoRA in place of copies", tuple(words), step.devices, recipe.rehearse(words, step.devices))


def _shards(recipe: _Planned, step: Step, limit: int) -> Step | None:
    """Over the fewest devices, a doubling of those there are, on which it fits."""
    devices = step.devices
    whole = step.found.spread * devices
    while devices < MOST_DEVICES:
        devices *= 2
        if step.found.bytes - step.found.spread + whole / devices <= limit:
            found = recipe.rehearse(step.words, devices)
            if found.bytes <= limit:
                return Step(f"sharded over {devices} devices", step.words, devices, found)
    return None


def _bytes_of(text: str | float) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(text))
    unit = match[2] or "GiB" if match else ""
    try:
        found = float(match[1]) * UNITS[unit] if match else 0.0
    except (KeyError, ValueError):
        found = 0.0
    if found <= 0:
        fix = f"Write 24GiB; units are {', '.join(UNITS)}."
        raise UserError("device_memory", "must be a positive size", repr(text), fix)
    return int(found)


def _rate(given: float | str | None) -> float | None:
    """TFLOP/s."""
    if given is None:
        return None
    if given == "measure":
        return measured_rate()
    if not 0 < float(given) < float("inf"):
        raise UserError("device_rate", "must be > 0 TFLOP/s, or measure", given, "An H100 reaches some 400 in bf16.")
    return float(given)


def measured_rate(size: int = 2048, repeats: int = 5) -> float:
    """TFLOP/s of products of matrices on this machine: bfloat16 on CUDA, float32 on a CPU, median of `repeats`."""
    cuda = torch.cuda.is_available()
    a = torch.ones(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)

    def seconds() -> float:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        return time.perf_counter() - started

    seconds()
    return 2 * size**3 / statistics.median(seconds() for _ in range(repeats)) / 1e12


def _report(steps: Sequence[Step], words: Sequence[str], limit: int | None, rate: float | None) -> dict[str, Any]:
    last = steps[-1]
    flops = sum(last.found.flops.values())
    return {
        "schema": SCHEMA,
        "device_memory": limit,
        "device_rate": rate,
        "fits": None if limit is None else last.found.bytes <= limit,
        "devices": last.devices,
        "samples_per_step": last.found.samples,
        "flops_per_step": flops,
        "seconds_per_step": None if rate is None else flops / rate / 1e12,
        "overrides": [*words, *last.words],
        "steps": [
            {"what": step.what, "words": list(step.words), "devices": step.devices, "bytes": step.found.bytes,
             **asdict(step.found)}
            for step in steps
        ],
    }  # fmt: skip


def _print(report: Mapping[str, Any], steps: Sequence[Step], fill: Sequence[str]) -> None:
    console, last, limit = Console(), steps[-1], report["device_memory"]
    console.print(_roles(last.found))
    console.print(_memory(steps, limit))
    seconds = report["seconds_per_step"]
    flops = ", ".join(f"{phase} {_scaled(value, 'FLOP', 1000)}" for phase, value in last.found.flops.items())
    lines = [
        f"one step: {last.found.samples} samples; on each device {_scaled(report['flops_per_step'], 'FLOP', 1000)} "
        f"({flops})" + ("" if seconds is None else f", {seconds:,.3g} s at {report['device_rate']:,.3g} TFLOP/s")
    ]
    if limit is not None:
        verdict = "fits" if report["fits"] else "does not fit, and nothing more is known to help"
        many = "1 device" if last.devices == 1 else f"each of {last.devices} devices"
        lines.append(f"{verdict}: {_scaled(last.found.bytes)} of {_scaled(limit)} on {many}")
    lines.append("train " + " ".join([*report["overrides"], *(f"{word.partition('=')[0]}=..." for word in fill)]))
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _roles(found: Rehearsal) -> Table:
    table = Table("role", "as", title="roles; what is frozen and shared is counted once", box=box.SIMPLE_HEAD)
    for name in ("parameters", "weights", "gradients", "optimizer", "average"):
        table.add_column(name, justify="right")
    for part in found.parts:
        sizes = (part.weights, part.gradients, part.optimizer, part.averages)
        table.add_row(
            part.role, part.mode, _scaled(part.parameters, "", 1000), *(_scaled(size) if size else "" for size in sizes)
        )
    return table


def _memory(steps: Sequence[Step], limit: int | None) -> Table:
    """Each step a column: the recipe as it is, and after each change."""
    title = "one device at its peak" + ("" if len(steps) == 1 else "; each column adds its change to those before")
    table = Table("", title=title, box=box.SIMPLE_HEAD)
    for step in steps:
        table.add_column(step.what, justify="right")
    for kind in ("weights", "optimizer", "averages", GRADIENTS, ACTIVATIONS):
        table.add_row(kind, *(_scaled(step.found.peak.get(kind, 0.0)) for step in steps))
    if any(step.found.gathered for step in steps):
        table.add_row("gathered blocks", *(_scaled(step.found.gathered) for step in steps))
    table.add_row("together", *(_scaled(step.found.bytes) for step in steps))
    if limit is not None:
        table.add_row("fits", *("yes" if step.found.bytes <= limit else "no" for step in steps))
    return table


def _scaled(value: float, unit: str = "B", thousand: int = 1024) -> str:
    """A number with the prefix that leaves one to four digits: 1.5 GiB, 320 GFLOP."""
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if thousand == 1024 else ("", "k", "M", "G", "T", "P")
    power = 0
    while value >= thousand and power < len(prefixes) - 1:
        value, power = value / thousand, power + 1
    return f"{value:.3g} {prefixes[power]}{unit}" if value < 1000 else f"{value:.0f} {prefixes[power]}{unit}"


def arguments(words: Sequence[str]) -> list[str]:
    """The words of the command line as keys of this verb."""
    return gathered(words, OWN)
