"""The verb train: check everything, hold the folder, begin or go on, stage by stage."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf

from diffdistill import checkpoint, logs, ranks
from diffdistill.cached_tensors import Source, sources
from diffdistill.checkpoint import Checkpoint
from diffdistill.compiling import Compile, check_compile
from diffdistill.config import build, compose
from diffdistill.config_check import check_kind
from diffdistill.config_types import dot, show
from diffdistill.data import Data, Untold
from diffdistill.errors import UserError
from diffdistill.evaluation import factors, harness
from diffdistill.evaluation.harness import Evaluation
from diffdistill.evaluation.vitals import Health
from diffdistill.hashing import file_sha256
from diffdistill.memory import freed_is_kept
from diffdistill.networks.adapter import AdapterSpec
from diffdistill.networks.files import resolve
from diffdistill.networks.lora import LoraSpec
from diffdistill.networks.roles import Networks
from diffdistill.pairs import PairSource
from diffdistill.parallel import Parallel, num_processes
from diffdistill.probe import Probe, ask
from diffdistill.recipe import MADE, Recipe, assemble
from diffdistill.run import Run
from diffdistill.run_folder import RunFolder, read_json, writing
from diffdistill.saved_run import load_run
from diffdistill.stages import Part, parts
from diffdistill.trackers import Tracker
from diffdistill.trainer import Trainer
from diffdistill.trajectories import TrajectorySource
from diffdistill.warm_start import warm_start
from diffdistill.watchdog import Watchdog

# What may differ when a run goes on: where it lies, how often it saves and who looks on, not what it computes.
_FREE = ("trainer.checkpoint_every", "trainer.keep", "watchdog", "watchdog.seconds", "watchdog.exit_status")
# How the same samples are spread over processes: a checkpoint fits any, `_check_global_batch` sees that they are those.
_SPREAD = ("trainer.batch_size", "trainer.accumulate", "parallel.mesh", "parallel.shard_size",
           "parallel.reshard_after_forward", "parallel.backend", "parallel.timeout")  # fmt: skip
_GIVEN = (*_FREE, *_SPREAD)
_NOT_COMPARED = ("run_dir", "resume", "dry_run", "command", "probe", "parallel", *_GIVEN)
_NOT_COMPARED_BELOW = ("probe.", "watchdog.")
Resume = bool | Literal["auto"]


# What nodes at the top build.
KINDS: Mapping[str, tuple[type, ...]] = {
    "trainer": (Trainer,), "evaluation": (Evaluation,), "tracker": (Tracker,), "watchdog": (Watchdog,),
    "health": (Health,), "probe": (Probe,), "lora": (LoraSpec,), "adapter": (AdapterSpec,), "pairs": (PairSource,),
    "trajectories": (TrajectorySource,), "data": (Data, Untold),
}  # fmt: skip


def train(
    data: DictConfig,
    networks: DictConfig,
    sampler: DictConfig,
    distiller: DictConfig,
    trainer: DictConfig,
    evaluation: DictConfig,
    tracker: DictConfig,
    run_dir: str,
    precision: Literal["fp32", "bf16"] | None,
    guidance: DictConfig,
    roles: DictConfig,
    attention: DictConfig,
    lora: DictConfig,
    init: dict[str, str],
    stages: dict[str, dict[str, Any]],
    adapter: DictConfig,
    pairs: DictConfig | None,
    trajectories: DictConfig | None,
    probe: DictConfig | None,
    health: DictConfig | None,
    parallel: DictConfig,
    watchdog: DictConfig | None,
    resume: bool | Literal["auto"],
    channels_last: bool,
    onednn: bool,
    compile: Compile,
    together: bool,
    checkpointing: bool,
    command: str,
    dry_run: bool,
) -> dict[str, Any] | None:
    """Train, evaluate and export one run; returns its summary (also in run_dir/summary.json).

    Everything a user can get wrong is checked before the first step, for every stage; with dry_run that is all that
    happens. pairs, trajectories: a PairSource and a TrajectorySource, for methods that need what the teacher makes.
    probe: a Probe, which asks the teacher before it is used. health: what is measured beside training. watchdog: a
    Watchdog, which tells when training stands still. resume: true goes on with the run in run_dir; auto does, or begins
    where there is none.
    """
    settings: Mapping[str, Any] = dict(locals())
    check_kind(parallel, (Parallel,), "parallel")
    group: Parallel = build(parallel)
    with group.running(), _one_voice():
        return _train(settings, RunFolder(Path(run_dir)), resume, dry_run)


def _train(settings: Mapping[str, Any], folder: RunFolder, resume: Resume, dry_run: bool) -> dict[str, Any] | None:
    """`train`, among processes that can talk."""
    if resume is False:
        ranks.on_main(folder.refuse_occupied)
    elif (stored := ranks.on_main(lambda: _stored(folder, settings, resume))) is not None:
        settings = stored
        if ranks.on_main(lambda: folder.is_finished):
            return _finished(folder, resume)
    accelerator = accelerator_of(settings["precision"])
    check_compile(settings["compile"], accelerator.device)
    todo = [part for part in parts(settings, folder, train) if not (part.name and part.folder.is_finished)]
    first = _prepared(todo[0], todo, torch.device("meta") if dry_run else accelerator.device)
    for part in todo[1:]:  # checked by shape before the first begins, built when their turn comes
        _prepared(part, todo, torch.device("meta"))
    if dry_run:
        logs.console().print("dry run: the configuration is good, nothing was trained.")
        return None
    with _held(folder), freed_is_kept(accelerator.device):
        ranks.on_main(lambda: _claim(folder, settings, resume))
        summary = _run(first, accelerator, resume)
        del first  # one part's networks at a time
        for part in todo[1:]:
            summary = _run(_prepared(part, [], accelerator.device), accelerator, resume)
    return summary


def _claim(folder: RunFolder, settings: Mapping[str, Any], resume: Resume) -> None:
    if resume is False:
        folder.refuse_occupied()  # it may have been taken since
    if not folder.config_file.is_file():
        folder.write_config(settings)


@contextmanager
def _held(folder: RunFolder) -> Iterator[None]:
    """The main process holds the folder, for all."""
    with ExitStack() as stack:
        ranks.on_main(lambda: stack.enter_context(folder.held()))
        yield


@contextmanager
def _one_voice() -> Iterator[None]:
    """The main process alone prints."""
    with ExitStack() as stack:
        if not ranks.is_main():
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        yield


@dataclass(frozen=True)
class _Prepared:
    """A part that was checked and built."""

    part: Part
    recipe: Recipe
    trainer: Trainer
    evaluation: Evaluation | None
    teacher_figures: dict[str, Any]
    sources: Mapping[str, Source]
    health: Health | None
    watchdog: Watchdog | None
    tracker: Tracker
    probe: dict[str, Any] | None


def _prepared(part: Part, among: list[Part], device: torch.device) -> _Prepared:
    """Build a part on `device`, every mistake told. among: the parts of a recipe whose stages have not run yet."""
    settings = part.settings
    for key, kinds in KINDS.items():
        check_kind(settings.get(key), kinds, key)
    several = ranks.place()[1] > 1 and device.type != "meta"
    group: Parallel = build(settings["parallel"])
    recipe = ranks.together(lambda: assemble(settings, device, "cpu" if several and group.sharded else device))
    if several:
        group.spread(recipe.networks)
    trainer: Trainer = build(settings["trainer"])
    judge: Evaluation | None = build(settings["evaluation"])
    if judge is not None and judge.metrics == ():
        judge = None
    trainer.check_roles(recipe.networks)
    fresh = ranks.on_main(lambda: not checkpoint.steps(part.folder.checkpoints))
    if fresh:  # else weights come from there, and the source may be gone
        warm_start(recipe.networks, settings["init"] or {}, functools.partial(_source, part, among))
    figures: dict[str, Any] = {}
    if judge is not None:
        judge.check(recipe.data)
        if judge.factors:
            factors.check(recipe)
        if judge.teacher == "card":
            figures = harness.read_card(*card_of(settings["networks"]), judge, recipe.data, recipe.sampler.nfe)
    probe: Probe | None = build(settings.get("probe"))
    asked = None
    if probe is not None and fresh and device.type != "meta":
        asked = ask(probe, recipe, settings["networks"]).to_json()
    health: Health | None = build(settings.get("health"))
    watchdog: Watchdog | None = build(settings.get("watchdog"))
    for key in MADE.values():  # also where this method needs none: a mistake is told
        build(settings.get(key))
    tracker: Tracker = build(settings["tracker"])
    tracker.check()
    made = sources(recipe, settings)
    return _Prepared(part, recipe, trainer, judge, figures, made, health, watchdog, tracker, asked)


def _source(part: Part, among: list[Part], key: str, where: str) -> Networks:
    """The networks that `run:DIR` or `stage:NAME` names; a stage that has not run yet is built without weights."""
    kind, _, rest = where.partition(":")
    if kind == "run":
        return load_run(rest, key=key)[0].networks
    for other in among:
        if other.name == rest:
            return assemble(other.settings, "meta").networks
    root = part.folder.path.parent.parent if part.name else part.folder.path
    return load_run(str(root / "stages" / rest), key=key)[0].networks


def _run(prepared: _Prepared, accelerator: Accelerator, resume: Resume) -> dict[str, Any]:
    part, recipe = prepared.part, prepared.recipe
    if part.name:
        logs.console().print(f"stage {part.name}")
        ranks.on_main(lambda: part.folder.path.mkdir(parents=True, exist_ok=True))
    start = ranks.on_main(part.folder.newest)
    if start is None and resume is True and not part.name and not part.settings["stages"]:
        fix = "resume=auto starts it over."
        raise UserError("resume", "needs a checkpoint", str(part.folder.checkpoints), fix)
    if start is not None:
        _check_global_batch(start, part.settings, prepared.trainer)
    made = {}
    for key, source in prepared.sources.items():
        with writing(source.cache or part.folder.path, f"{key}.cache" if source.cache else "run_dir"):
            found = source.prepare(recipe, part.settings, part.folder.path)
        recipe, made[key] = found.join(recipe), found.summary()
    run = Run(
        part.folder, part.settings, recipe, prepared.trainer, prepared.evaluation, prepared.teacher_figures, made,
        prepared.health, prepared.watchdog, prepared.tracker, prepared.probe,
    )  # fmt: skip
    if part.settings["compile"] is not False:
        recipe.networks.compile(part.settings["compile"])
    return run.execute(accelerator, start)


def _check_global_batch(start: Checkpoint, settings: Mapping[str, Any], trainer: Trainer) -> None:
    """A run goes on with as many samples per step as before, on however many processes."""
    node = settings["trainer"]
    wanted = start.values.get("global_batch", node["batch_size"] * node["accumulate"])  # none: of one process
    if trainer.global_batch == wanted:
        return
    calls = ranks.place()[1] * trainer.accumulate
    fix = "Choose batch_size, accumulate and processes whose product it is."
    if wanted % calls == 0:
        fix = f"Set trainer.batch_size={wanted // calls}."
    constraint = (
        f"times accumulate and processes, {calls}, must be the {wanted} samples per step of the run that goes on"
    )
    raise UserError("trainer.batch_size", constraint, trainer.batch_size, fix)


def _stored(folder: RunFolder, settings: Mapping[str, Any], resume: Resume) -> Mapping[str, Any] | None:
    """The settings of the run in `folder`, which the given ones must agree with; None if there is no run to go on.

    Where nothing but the folder and free keys were given, its own settings are taken.
    """
    if not folder.config_file.is_file():
        if resume is True:
            raise UserError("resume", "needs a run to go on with", str(folder.path), "resume=auto begins a new one.")
        folder.refuse_occupied()
        return None
    stored = folder.read_config("run_dir")
    for key in (
        "adapter",
        "attention",
        "probe",
        "health",
        "parallel",
        "watchdog",
        "tracker",
        "channels_last",
        "onednn",
        "together",
        *MADE.values(),
    ):
        if key not in stored:  # written before there were any: its method needs none
            stored[key] = settings[key]
    if OmegaConf.is_dict(stored["evaluation"]) and "stop" not in stored["evaluation"]:  # likewise
        stored["evaluation"]["stop"] = compose("train").evaluation.stop
    ours, theirs = (dict(_leaves(OmegaConf.create(_plain(node)))) for node in (settings, stored))
    words = settings["command"].split()
    free = [key for key in _GIVEN if any(word.startswith(f"{key}=") for word in words)]
    if len(words) > len(free):
        for key in dict.fromkeys([*theirs, *ours]):
            if (
                key not in _NOT_COMPARED
                and not key.startswith(_NOT_COMPARED_BELOW)
                and ours.get(key) != theirs.get(key)
            ):
                fix = "Leave it out, or start a new run from the weights: init.student=run:DIR."
                given = show(ours.get(key))
                raise UserError(key, f"must be {show(theirs.get(key))}, as in the run that goes on", given, fix)
    kept = {key: settings[key] for key in ("run_dir", "resume", "dry_run")}
    for key in free:
        OmegaConf.update(stored, key, ours[key])
    return {**{str(key): stored[key] for key in stored}, **kept}


def _plain(node: Any) -> dict[str, Any]:
    return {str(k): OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in node.items()}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is no mapping with entries."""
    for name in node:
        full, value = dot(key, name), node[name]
        if OmegaConf.is_dict(value) and value:
            yield from _leaves(value, full)
        else:
            yield full, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _finished(folder: RunFolder, resume: Resume) -> dict[str, Any]:
    if resume is True:
        fix = "Its results stand; resume=auto passes over it."
        raise UserError("resume", "needs a run that is not finished", str(folder.path), fix)
    logs.console().print(f"finished before, nothing to do: {folder.path}", soft_wrap=True, highlight=False)
    return read_json(folder.path / "summary.json", "run_dir")


def accelerator_of(precision: str | None, cpu: bool = False) -> Accelerator:
    """Device and autocast of a run. precision: None is bf16 on CUDA, else fp32.  cpu: also where there is a GPU."""
    if precision is None:
        precision = "bf16" if torch.cuda.is_available() and not cpu else "fp32"
    AcceleratorState._reset_state(True)  # a second run of this process may ask for another precision
    cpu = cpu or (num_processes() > 1 and not torch.cuda.is_available())
    return Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[precision], cpu=cpu)


def card_of(networks: Mapping[str, Any]) -> tuple[Path, str]:
    """Where the teacher's card lies and the hash of its weights."""
    folder = Path(resolve(str(networks.get("path", ""))))
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder  # of a pipeline's folder
    weights = next(iter(sorted(inner.glob("*.safetensors"))), None) if networks.get("path") else None
    if weights is None:
        raise UserError(
            "evaluation.teacher", "card needs shipped weights", networks.get("_target_"), "Set it to fresh or none."
        )
    return folder / "metrics.json", file_sha256(weights)
