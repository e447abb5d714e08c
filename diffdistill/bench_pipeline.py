"""`diffdistill bench pipeline`: the whole call of a diffusers pipeline against the network calls inside it.

Interleaved in one process, on one thread, by CPU clock (on a GPU by the wall's): every round times the pipeline as its
users call it, the whole call with tensors out and without a progress bar, and that call once more; after each of them
the network calls, which were recorded beforehand, alone. The last whole call against the one before is the null ratio:
if it leaves .98 to 1.02 the machine is too noisy to tell.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from diffdistill.bench_step import Clock
from diffdistill.compiling import Compile, check_compile, options
from diffdistill.errors import UserError, require_at_least
from diffdistill.machine import machine, versions
from diffdistill.networks.files import resolve
from diffdistill.pipeline_calls import NetworkCall, networks_of, recorded_calls, tensors_in
from diffdistill.pipelines import DENOISERS, PipelineSampler
from diffdistill.run_folder import new_file, writing

SCHEMA = 1
NOISY = 3
QUICK_PAIRS = 8
SEED = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "a photograph"  # of a pipeline whose call.json names none
CLOSE = 1e-3  # of the largest value: a call made again gives the answer it gave, but for the kernels' rounding


@dataclass(frozen=True)
class Round:
    """Milliseconds of one round. first, again: the whole call.  alone: of each network call, one list for each time
    that they were made alone.  called: the call as users make it, None where the pipeline cannot make it.
    """

    first: float
    again: float
    alone: tuple[tuple[float, ...], ...]
    called: float | None = None


def figures(rounds: Sequence[Round], names: Sequence[str]) -> dict[str, Any]:
    """Medians over rounds, in milliseconds, and their ratios. names: of the network calls, in order."""
    alone = [one for each in rounds for one in each.alone]
    networks = statistics.median(sum(one) for one in alone)
    whole = statistics.median(time for each in rounds for time in (each.first, each.again))
    times = [each.called for each in rounds if each.called is not None]
    called = statistics.median(times) if times else None
    parts = [
        {
            "name": name,
            "count": names.count(name),
            "milliseconds": statistics.median(
                sum(time for own, time in zip(names, one, strict=True) if own == name) for one in alone
            ),
        }
        for name in dict.fromkeys(names)
    ]
    return {
        "pairs": len(rounds),
        "parts": parts,
        "networks_milliseconds": networks,
        "call_milliseconds": whole,
        "as_called_milliseconds": called,
        "beside_networks_milliseconds": whole - networks,
        "ratio": whole / networks,
        "ratio_as_called": None if called is None else called / networks,
        "null_ratio": statistics.median(each.again / each.first for each in rounds),
    }


def pipeline(
    pipeline: str,
    batch_sizes: list[int],
    pairs: int,
    precision: Literal["fp32", "bf16"],
    channels_last: bool,
    compile: Compile,
    device: Literal["cpu", "cuda"],
    quick: bool,
    out: str | None,
) -> int:
    """Bench a pipeline at every batch size; prints a table and the verdict last. Returns the exit status.

    pipeline: folder, hub id or asset:NAME.  pairs: interleaved rounds; quick: fewer.  compile: of the denoising
    network, as users do; precision, channels_last: of all networks.  out: JSON file.
    """
    if pairs < 2:
        raise UserError("pairs", "must be >= 2", pairs, "40 is a good number.")
    if not batch_sizes:
        raise UserError("batch_sizes", "must name a batch size", list(batch_sizes), "Write 'batch_sizes=[1,16]'.")
    for size in batch_sizes:
        require_at_least(1, batch_sizes=size)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "must be one that torch finds here", device, "Set device=cpu.")
    check_compile(compile, device)
    if out is not None:
        new_file("out", out)
    sampler = PipelineSampler.load(str(resolve(pipeline)), dtype=DTYPES[precision])
    console, rounds = Console(), QUICK_PAIRS if quick else pairs
    with _one_thread(device):
        bench = PipelineBench(sampler, torch.device(device), channels_last)
        calls = {size: bench.recorded(size) for size in batch_sizes}  # compiled code is not watched
        if compile is not False:
            bench.compile(compile)
        results = [bench.measured(size, calls[size], rounds) for size in batch_sizes]
    name = type(sampler.pipeline).__name__
    console.print(_table(name, results))
    if out is not None:
        report = {
            "schema": SCHEMA,
            "machine": {**machine(), "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"},
            "versions": versions(),
            "pipeline": {"class": name, "call": sampler.call, "nfe": sampler.nfe, "parameters": bench.sizes()},
            "form": {"precision": precision, "channels_last": channels_last, "compile": compile},
            "results": results,
        }
        with writing(out, "out", "Name another place, or make room."):
            Path(out).write_text(json.dumps(report, indent=1) + "\n")
    return _verdict(name, results, console)


class PipelineBench:
    """A pipeline in the form that is timed."""

    def __init__(self, sampler: PipelineSampler, device: torch.device, channels_last: bool = False) -> None:
        self.sampler, self.pipeline, self.clock = sampler, sampler.pipeline, Clock(device)
        self.pipeline.to(device)
        if channels_last:
            for network in networks_of(self.pipeline).values():
                network.to(memory_format=torch.channels_last)

    @property
    def denoisers(self) -> list[Any]:
        """The components that steps call. Raises UserError where there is none by a usual name."""
        networks = networks_of(self.pipeline)
        found = [networks[name] for name in DENOISERS if name in networks]
        if not found:
            held = ", ".join(networks) or "no network"
            raise UserError("pipeline", f"must have one of {', '.join(DENOISERS)}", held, "Name another one.")
        return found

    def compile(self, compile: Compile) -> None:
        """The denoising networks in place."""
        for network in self.denoisers:
            network.compile(**options(compile))

    def sizes(self) -> dict[str, int]:
        """Parameters of every network."""
        return {k: sum(p.numel() for p in part.parameters()) for k, part in networks_of(self.pipeline).items()}

    def inputs(self, batch_size: int) -> dict[str, Any]:
        """What a call of so many samples is told."""
        takes = inspect.signature(self.pipeline.__call__).parameters
        if "prompt" in takes:
            prompts = self.sampler.prompts or (PROMPT,)
            return {"prompt": [prompts[i % len(prompts)] for i in range(batch_size)]}
        if "batch_size" not in takes:
            constraint, fix = "must take prompts or a batch size", "Name another one."
            raise UserError("pipeline", constraint, f"{type(self.pipeline).__name__}, which takes {[*takes]}", fix)
        classes = self.denoisers[0].config.get("num_class_embeds")
        labels = {"class_labels": [i % classes for i in range(batch_size)]} if classes else {}
        return {"batch_size": batch_size, **labels}

    def whole(self, inputs: Mapping[str, Any]) -> Any:
        """Tensors out, no progress bar."""
        self.pipeline.set_progress_bar_config(disable=True)
        return self.sampler.made(inputs, torch.Generator().manual_seed(SEED))

    def as_called(self, inputs: Mapping[str, Any]) -> Any:
        """Pictures out, and the bar, drawn into nothing."""
        self.pipeline.set_progress_bar_config(disable=False)
        with Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
            return self.pipeline(**inputs, **self.sampler.call, generator=torch.Generator().manual_seed(SEED))

    def recorded(self, batch_size: int) -> list[NetworkCall]:
        """The network calls of one whole call. Raises UserError if one of them, made again, gives another answer."""
        with recorded_calls(self.pipeline) as calls:
            self.whole(self.inputs(batch_size))
        for call in calls:
            for was, now in zip(call.answer, tensors_in(call.again()), strict=True):
                difference = float((was - now).abs().max() / was.abs().max().clamp(min=1e-6))
                if not difference <= CLOSE:
                    constraint = f"must have networks that answer the same again: {call.name} does not"
                    raise UserError("pipeline", constraint, f"{difference:.2g}", "Switch off its caches and dropout.")
        return calls

    def measured(self, batch_size: int, calls: Sequence[NetworkCall], pairs: int) -> dict[str, Any]:
        """Figures of one batch size, after one round that warms up and compiles."""
        inputs = self.inputs(batch_size)
        ways = [functools.partial(self.whole, inputs)] * 2
        if self.makes_pictures(inputs):
            ways.append(functools.partial(self.as_called, inputs))
        rounds = [self._round(ways, calls) for _ in range(1 + pairs)][1:]
        return {"batch_size": batch_size, **figures(rounds, [call.name for call in calls])}

    def makes_pictures(self, inputs: Mapping[str, Any]) -> bool:
        """Whether it can be called as users call it: not every pipeline of diffusers can in bf16, of which numpy has no
        arrays."""
        try:
            self.as_called(inputs)
        except TypeError:
            return False
        return True

    def _round(self, ways: Sequence[Callable[[], Any]], calls: Sequence[NetworkCall]) -> Round:
        times, alone = [], []
        for way in ways:  # each after the networks: equally warm caches
            times.append(self._timed(way))
            alone.append(tuple(self._timed(one.again) for one in calls))
        return Round(times[0], times[1], tuple(alone), *times[2:])

    def _timed(self, function: Callable[[], Any]) -> float:
        started = self.clock.now()
        function()
        return self.clock.now() - started


@contextlib.contextmanager
def _one_thread(device: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _table(name: str, results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{name}: the whole call beside its network calls, {results[0]['pairs']} pairs")
    table.add_column("")
    for result in results:
        table.add_column(f"batch {result['batch_size']}", justify="right")
    for index, part in enumerate(results[0]["parts"]):
        texts = (f"{result['parts'][index]['milliseconds']:.2f}" for result in results)
        table.add_row(f"{part['count']} x {part['name']}, ms", *texts)
    table.add_section()
    for text, key, digits in LINES:
        shown = ("none" if result[key] is None else f"{result[key]:.{digits}f}" for result in results)
        table.add_row(text, *shown)
    return table


LINES = (
    ("the network calls, ms", "networks_milliseconds", 2),
    ("the whole call, ms", "call_milliseconds", 2),
    ("as users call it, ms", "as_called_milliseconds", 2),
    ("whole call / network calls", "ratio", 3),
    ("as users call it / network calls", "ratio_as_called", 3),
    ("null ratio", "null_ratio", 3),
)


def _verdict(name: str, results: Sequence[dict[str, Any]], console: Console) -> int:
    noisy = [one for one in results if not 0.98 <= one["null_ratio"] <= 1.02]
    if noisy:
        which = max(noisy, key=lambda one: abs(one["null_ratio"] - 1))
        text = f"null ratio {which['null_ratio']:.3f} at batch {which['batch_size']} is outside .98 to 1.02"
        console.print(f"verdict: too noisy to tell: {text}", soft_wrap=True)
        return NOISY
    found = ", ".join(f"{one['ratio']:.3f} at batch {one['batch_size']}" for one in results)
    console.print(f"verdict: a call of {name} costs {found} times its network calls", soft_wrap=True)
    return 0
