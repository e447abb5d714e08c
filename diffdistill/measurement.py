"""The verb evaluate: samples of any origin against any reference, streamed, over any number of processes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffdistill.cached_tensors import why_no_folder
from diffdistill.errors import UserError, require_at_least
from diffdistill.evaluation import harness
from diffdistill.evaluation.costs import latency_ms, peak_bytes
from diffdistill.evaluation.metrics import Figures, check_samples, circumstances, figures_of
from diffdistill.evaluation.protocol import Protocol, require_same
from diffdistill.evaluation.rows import Rows
from diffdistill.evaluation.sources import Files, Source
from diffdistill.evaluation.spaces import load_space
from diffdistill.evaluation.statistics_file import Statistics, write_statistics
from diffdistill.evaluation.store import RowStore
from diffdistill.measurement_plan import Folders, Measured, Plan, Theirs, reference_of
from diffdistill.pictures import where
from diffdistill.pipelines import PipelineSampler
from diffdistill.run_folder import new_file, writing
from diffdistill.subject import Subject

SCHEMA = 2  # of the JSON file
_ELSEWHERE = "Name another place, or make room."


def evaluate(
    run: str | None,
    pipeline: str | None,
    samples: str | None,
    steps: int | None,
    checkpoint: int | Literal["last", "best"],
    num_samples: int | None,
    seed: int,
    teacher: bool,
    reference: str | None,
    statistics: str | None,
    against: str | None,
    clips: bool,
    size: int | None,
    corrupt_share: float,
    metrics: tuple[str, ...] | None,
    features: str | None,
    clip: str | None,
    prdc_space: Literal["values", "features"] | None,
    replicates: int | None,
    latency_batches: tuple[int, ...],
    batch_size: int,
    work: str | None,
    out: str | None,
    data: DictConfig | None = None,
) -> dict[str, Any] | None:
    """Measure samples of a run, a pipeline or a folder; prints, returns and optionally writes figures and protocol.

    The keys are those of configs/evaluate.yaml. Of several processes the first one returns the result, others None.
    """
    _check_numbers(num_samples, seed, size, corrupt_share, metrics, replicates, latency_batches, batch_size)
    for key, file in (("out", out), ("statistics", statistics)):
        if file is not None:
            new_file(key, file)
    if statistics is not None and Path(statistics).suffix != ".safetensors":
        raise UserError("statistics", "must end in .safetensors", statistics, "Name such a file.")
    if work is not None and (reason := why_no_folder(work)):
        raise UserError("work", f"must name a folder: {reason}", repr(work), "Name another one.")
    earlier = None if against is None else _earlier(against)
    state = _processes()
    if state.num_processes > 1 and work is None:
        fix = "Add work=FOLDER, on a disk that all of them see."
        raise UserError("work", f"must be given for {state.num_processes} processes", None, fix)
    told = "clip_score" in (metrics or ()) or (clip is not None and metrics in (None, ("all",)))
    folders = Folders(clips, size, corrupt_share, told)
    mine = Measured.found(run, pipeline, samples, data, steps, checkpoint, num_samples, seed, batch_size, folders)
    theirs = reference_of(reference, mine, folders)
    space = mine.own_features if features is None else load_space(features, mine.device)
    plan = Plan.made(metrics, mine, theirs, space, prdc_space, seed, replicates, clip, teacher, statistics is not None)
    if earlier is not None:
        require_same(Protocol.from_json(earlier["protocol"]), _protocol(plan, mine, theirs))
    return _measured(plan, mine, theirs, state, work, latency_batches, statistics, earlier, out)


def _measured(
    plan: Plan, mine: Measured, theirs: Theirs, state: PartialState, work: str | None,
    latency_batches: Sequence[int], statistics: str | None, earlier: Mapping[str, Any] | None, out: str | None,
) -> dict[str, Any] | None:  # fmt: skip
    """Fill the rows, in this process and the others; the first one makes figures of them."""
    with ExitStack() as stack, writing(work or tempfile.gettempdir(), "work", _ELSEWHERE):
        folder = Path(work) if work is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides: list[tuple[str, Literal["samples", "reference"], Source]] = [("samples", "samples", mine.source)]
        if plan.teacher:
            sides.append(("teacher", "samples", mine.teacher()))
        if theirs is not None and not isinstance(theirs, Statistics):
            sides.append(("reference", "reference", theirs))
        stores = {}
        for name, side, source in sides:
            if not plan.columns(side):
                continue
            stores[name] = RowStore(folder / name, source.size, plan.card(side, source) if work else {})
            _fill(stores[name], source, plan, side, name, state)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        rows = {name: store.rows() for name, store in stores.items()}
        if isinstance(theirs, Statistics):
            rows["reference"] = theirs.rows
        return _concluded(plan, mine, theirs, rows, latency_batches, statistics, earlier, out)


def _processes() -> PartialState:
    """This process among those that torchrun or accelerate started; on CPUs they are told to meet there."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=several and not torch.cuda.is_available())


def _fill(
    store: RowStore, source: Source, plan: Plan, side: Literal["samples", "reference"], name: str, state: PartialState
) -> None:
    """Make this process's share of the rows that are not there yet."""
    left = store.shards(state.process_index, state.num_processes)
    extract = plan.extract(side)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = state.is_main_process and console.is_terminal
    with Progress(*bars, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(name, total=sum(map(len, left)))
        for ids in left:
            drawn = source.draw(ids)
            check_samples(drawn.samples, drawn.labels, plan.facts, set(plan.names) if side == "samples" else set())
            store.write(ids, extract(drawn.samples, drawn.labels, drawn.prompts))
            progress.advance(task, len(ids))


def _concluded(
    plan: Plan, mine: Measured, theirs: Theirs, rows: Mapping[str, Rows],
    latency_batches: Sequence[int], statistics: str | None, earlier: Mapping[str, Any] | None, out: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Figures, table and file of rows that are whole."""
    protocol = _protocol(plan, mine, theirs)
    found: dict[str, Any] = {"schema": SCHEMA, "source": mine.name, "device": _device(mine.device)}
    found["figures"] = _costs(plan, mine, latency_batches) | _figures(plan, rows.get("samples", {}), rows)
    shown = [(mine.name, found["figures"])]
    if plan.teacher:
        assert mine.of is not None and mine.of.recipe is not None
        nfe: Figures = {"nfe": mine.of.recipe.sampler.nfe} if "nfe" in plan.names else {}
        found["teacher"] = nfe | _figures(plan, rows.get("teacher", {}), rows)
        shown.append(("teacher", found["teacher"]))
    if earlier is not None:
        shown.append((f"{earlier['source']} (before)", earlier["figures"]))
    found |= {"left_out": dict(plan.left_out), "damaged": _damaged(mine, theirs), "protocol": protocol.to_json()}
    if statistics is not None and theirs is not None:
        with writing(statistics, "statistics", _ELSEWHERE):
            write_statistics(Path(statistics), rows["reference"], theirs, plan.features)
    _tell(plan, found, shown)
    if out is not None:
        with writing(out, "out", _ELSEWHERE):
            Path(out).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _protocol(plan: Plan, mine: Measured, theirs: Theirs) -> Protocol:
    sha256 = "none" if theirs is None else theirs.sha256
    return circumstances(
        plan.facts, sha256, plan.features, mine.source.size, plan.seed, plan.replicates, plan.prdc_space,
        clip_model=None if plan.clip is None else plan.clip.sha256,
    )  # fmt: skip


def _figures(plan: Plan, ours: Rows, rows: Mapping[str, Rows]) -> Figures:
    return figures_of(
        plan.names, ours, rows.get("reference", {}), plan.facts,
        seed=plan.seed, replicates=plan.replicates, prdc_space=plan.prdc_space,
    )  # fmt: skip


def _costs(plan: Plan, mine: Measured, batches: Sequence[int]) -> Figures:
    """nfe, latency_ms and peak_memory_bytes of the generator, those asked for."""
    if mine.of is None:
        return {}
    of, found = mine.of, Figures()
    device, dtype = where(of.networks)
    if "nfe" in plan.names:
        found["nfe"] = of.sampler.nfe
    if "latency" in plan.names:
        for batch in batches:
            name = "latency_ms" if batch == 1 else f"latency_ms_of_{batch}"
            found[name] = latency_ms(of.sampler, of.data, device, dtype, batch)
    if "peak_memory" in plan.names:
        found["peak_memory_bytes"] = peak_bytes(of.sampler, of.data, _held(of), device, dtype, max(batches))
    return found


def _held(of: Subject) -> list[Tensor]:
    """The weights that sampling needs in memory."""
    if of.networks is None:
        assert isinstance(of.sampler, PipelineSampler)
        parts = of.sampler.pipeline.components.values()
        return [p for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()]
    shares = of.networks.modes.get("student") != "copy"
    teacher = list(of.networks.teacher.parameters()) if shares else []
    return [*teacher, *(of.networks.weights("student") if "student" in of.networks.roles else [])]


def _damaged(mine: Measured, theirs: object) -> dict[str, list[str]]:
    sides = (("samples", mine.source), ("reference", theirs))
    return {name: list(side.damaged) for name, side in sides if isinstance(side, Files) and side.damaged}


def _tell(plan: Plan, found: Mapping[str, Any], shown: Sequence[tuple[str, Figures]]) -> None:
    console = Console()
    console.print(harness.table(shown))
    for name, why in plan.left_out.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True, highlight=False)
    for side, names in found["damaged"].items():
        console.print(f"{side}: {len(names)} damaged and left out: {'; '.join(names)}", soft_wrap=True, highlight=False)
    if plan.clip is not None:
        plan.clip.tell_cut()


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _earlier(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError("against", f"must be a file that out= wrote: {error}", path, "Name one.") from error
    if not isinstance(found, dict) or not {"source", "figures", "protocol"} <= found.keys():
        raise UserError("against", "must be a file that out= wrote", path, "It holds something else.")
    return found


def _check_numbers(
    num_samples: int | None, seed: int, size: int | None, corrupt_share: float, metrics: tuple[str, ...] | None,
    replicates: int | None, latency_batches: tuple[int, ...], batch_size: int,
) -> None:  # fmt: skip
    counts = {"num_samples": num_samples, "size": size, "batch_size": batch_size}
    require_at_least(1, **{key: value for key, value in counts.items() if value is not None})
    require_at_least(0, seed=seed, replicates=replicates or 0)
    if not (math.isfinite(corrupt_share) and 0 <= corrupt_share < 1):
        raise UserError("corrupt_share", "must lie in [0, 1)", corrupt_share, "0 refuses any damaged file.")
    if metrics == ():
        raise UserError("metrics", "must name a metric", "[]", "Leave it out for those that fit the data.")
    if metrics is not None and "all" in metrics and len(metrics) > 1:
        raise UserError("metrics", "must be [all], or names", list(metrics), "Leave the names out.")
    if not latency_batches or min(latency_batches) < 1:
        raise UserError("latency_batches", "must be batch sizes >= 1", list(latency_batches), "Write [1,8].")
