"""The verbs train, sample, evaluate and export as functions: from a checked configuration to files in run_dir."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from diffdistill import checkpoint
from diffdistill.config import build
from diffdistill.data import Data
from diffdistill.errors import UserError
from diffdistill.evaluation import harness, plots
from diffdistill.evaluation.harness import Evaluation
from diffdistill.export import refusal
from diffdistill.export import write as write_pipeline
from diffdistill.networks.files import resolve
from diffdistill.networks.roles import Networks
from diffdistill.pipelines import PipelineSampler, with_steps
from diffdistill.recipe import Recipe, assemble, load_run
from diffdistill.solvers import Sampler
from diffdistill.trainer import Outcome, Progress, Trainer

SCHEMA = 1


def train(
    data: DictConfig,
    networks: DictConfig,
    sampler: DictConfig,
    distiller: DictConfig,
    trainer: DictConfig,
    evaluation: DictConfig,
    run_dir: str,
    precision: Literal["fp32", "bf16"] | None,
    guidance: DictConfig,
    roles: DictConfig,
    lora: DictConfig,
    compile: bool,
    command: str,
    dry_run: bool,
) -> dict[str, Any] | None:
    """Train, evaluate and export one run; returns its summary (also in run_dir/summary.json).

    Everything a user can get wrong is checked before the first step; with dry_run that is all that happens.
    """
    settings = dict(locals())
    folder = Path(run_dir)
    refuse_occupied(folder)
    accelerator = _accelerator(precision)
    device = torch.device("meta") if dry_run else accelerator.device
    recipe = assemble(settings, device)
    loop: Trainer = build(trainer)
    judge: Evaluation | None = build(evaluation)
    if judge is not None and judge.metrics == ():
        judge = None
    loop.check_roles(recipe.networks)
    teacher_figures: dict[str, Any] = {}
    if judge is not None:
        judge.check(recipe.data)
        if judge.teacher == "card":
            teacher_figures = harness.read_card(*_card(networks), judge, recipe.data, recipe.sampler.nfe)
    if dry_run:
        Console().print("dry run: the configuration is good, nothing was trained.")
        return None
    run = Run(folder, settings, recipe, loop, judge, teacher_figures)
    if compile:
        recipe.networks.compile()
    return run.execute(accelerator)


def refuse_occupied(folder: Path) -> None:
    """A run never writes over another."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("run_dir", "must be new or empty", str(folder), "Name another folder, or move this one away.")


class Run:
    """One training run and what it writes into its folder."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        recipe: Recipe,
        trainer: Trainer,
        evaluation: Evaluation | None,
        teacher_figures: dict[str, Any],
    ) -> None:
        self.folder, self.settings, self.recipe, self.trainer = folder, settings, recipe, trainer
        self.evaluation, self.teacher_figures = evaluation, teacher_figures
        self.console = Console()

    def execute(self, accelerator: Accelerator) -> dict[str, Any]:
        """Train with a progress bar, then save, evaluate, export and print the summary."""
        self._open()
        recipe = self.recipe
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("training", total=self.trainer.steps)

            def log(step: int, figures: Mapping[str, float]) -> None:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, **figures}) + "\n")
                shown = [f"{k} {v:.3g}" for k, v in figures.items() if "/" in k and not k.startswith(("lr", "time"))]
                bar.update(task, completed=step, description="  ".join(shown[:3]))

            progress = Progress(log, self._save, self._evaluate_interim)
            every = self.evaluation.every if self.evaluation else 0
            outcome = self.trainer.fit(
                recipe.distiller, recipe.networks, recipe.data, recipe.needs, accelerator, progress, every
            )
        self._save(self.trainer.steps)
        return self._conclude(outcome)

    def _open(self) -> None:
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            plain = {k: v for k, v in self.settings.items() if k not in ("dry_run",)}
            header = f"# schema {SCHEMA}\n"
            (self.folder / "config.yaml").write_text(header + OmegaConf.to_yaml(OmegaConf.create(plain)))
        except OSError as error:
            raise UserError("run_dir", "must be writable", self.folder, str(error)) from error

    def _save(self, step: int) -> None:
        checkpoint.save(self.recipe.networks, self.folder / "checkpoints", step)

    def _evaluate_interim(self, step: int) -> None:
        assert self.evaluation is not None
        with self.recipe.networks.averaged():
            self._picture(step)
            figures, _ = self._figures(self.recipe.distiller.generator, harness.interim(self.evaluation))
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **{f"evaluation/{k}": v for k, v in figures.items()}}) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float))
        self.console.print(f"step {step}: {shown}")

    def _figures(self, sampler: Sampler, evaluation: Evaluation) -> tuple[dict[str, Any], Any]:
        networks = self.recipe.networks
        return harness.evaluate(sampler, self.recipe.data, evaluation, networks.device, networks.dtype)

    def _picture(self, step: int) -> None:
        data, networks = self.recipe.data, self.recipe.networks
        num = 2000 if len(data.shape) == 1 else 8 * (data.num_classes or 8)
        path = self.folder / "samples" / f"step-{step:08d}.png"
        picture(data, self.recipe.distiller.generator, num, 0, path, networks)

    def _conclude(self, outcome: Outcome) -> dict[str, Any]:
        recipe = self.recipe
        summary: dict[str, Any] = {"schema": SCHEMA, "teacher": self.teacher_figures, "student": {}}
        with recipe.networks.averaged():
            self._picture(self.trainer.steps)
            if self.evaluation is not None:
                self.console.print(f"evaluating on {self.evaluation.num_samples} samples ...")
                summary["student"], protocol = self._figures(recipe.distiller.generator, self.evaluation)
                summary["protocol"] = protocol.to_json()
                if self.evaluation.teacher == "fresh":
                    summary["teacher"], _ = self._figures(recipe.sampler, self.evaluation)
            reason = refusal(recipe)
            if reason is None:
                write_pipeline(recipe, self.folder / "pipeline", self.settings, summary)
            else:
                self.console.print(f"no pipeline was written: {reason}", soft_wrap=True)
        summary |= {
            "wall_seconds": round(outcome.seconds, 2),
            "iterations": self.trainer.steps,
            "peak_memory_bytes": outcome.peak_bytes,
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        self._print(summary)
        return summary

    def _print(self, summary: Mapping[str, Any]) -> None:
        columns = [(name, summary[name]) for name in ("teacher", "student") if summary[name]]
        if columns:
            self.console.print(harness.table(columns))
        self.console.print(
            f"trained {summary['iterations']} steps in {summary['wall_seconds']} s; "
            f"peak live tensors {summary['peak_memory_bytes'] / 2**20:.1f} MiB"
        )
        self.console.print("look at next:")
        picture_ = sorted((self.folder / "samples").iterdir())[-1]
        for path in (picture_, self.folder / "summary.json", self.folder / "pipeline"):
            if not path.exists():
                continue
            self.console.print(f"  {path}", soft_wrap=True, highlight=False)


def picture(data: Data, sampler: Sampler, num: int, seed: int, path: Path, networks: Networks | None = None) -> None:
    """Draw a grid of images, one class per column where there are classes, or a scatter plot of points."""
    device, dtype = _where(networks)
    labels = torch.arange(num) % data.num_classes if data.num_classes else None
    samples, _ = harness.draw(sampler, data, num, seed, 500, device, dtype, labels)
    if len(data.shape) == 3:
        plots.sample_grid(samples, path, columns=data.num_classes if 2 <= data.num_classes <= 16 else 8)
    else:
        plots.scatter(samples, data.reference().data, path)


def _where(networks: Networks | None) -> tuple[torch.device, torch.dtype]:
    return (torch.device("cpu"), torch.float32) if networks is None else (networks.device, networks.dtype)


def sample(
    run: str | None,
    pipeline: str | None,
    num: int,
    steps: int | None,
    seed: int,
    out: str,
    data: DictConfig | None = None,
) -> str:
    """Draw num samples of a run or a pipeline folder into the picture `out`; returns its path.

    steps: network calls, None is what the generator was made for.  data: for a pipeline, what it generates.
    """
    if num < 1:
        raise UserError("num", "must be >= 1", num, "Ask for at least one sample.")
    set_, sampler, networks = _source(run, pipeline, data, steps)
    with torch.no_grad():
        picture(set_, sampler, num, seed, _new_file("out", out), networks)
    Console().print(f"{num} samples, {sampler.nfe} network evaluations each: {out}", soft_wrap=True)
    return out


def evaluate(
    run: str | None,
    pipeline: str | None,
    metrics: tuple[str, ...] | None,
    num_samples: int,
    steps: int | None,
    seed: int,
    batch_size: int,
    replicates: int,
    prdc_space: Literal["values", "features"],
    out: str | None,
    data: DictConfig | None = None,
) -> dict[str, Any]:
    """Measure num_samples samples of a run or a pipeline folder; returns and optionally writes figures and protocol."""
    judge = Evaluation(0, num_samples, num_samples, metrics, seed, batch_size, replicates, "none", prdc_space)
    set_, sampler, networks = _source(run, pipeline, data, steps)
    judge.check(set_)
    if out is not None:
        _new_file("out", out)
    figures, protocol = harness.evaluate(sampler, set_, judge, *_where(networks))
    Console().print(harness.table([(run or pipeline or "", figures)]))
    result = {"schema": SCHEMA, "source": run or pipeline, "figures": figures, "protocol": protocol.to_json()}
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    return result


def export(run: str, out: str, format: Literal["pipeline"]) -> str:
    """Write a finished run's generator as a stock diffusers folder, verified; returns its path."""
    recipe, settings = load_run(run)
    summary = Path(run) / "summary.json"
    figures = json.loads(summary.read_text()) if summary.is_file() else {}
    path = write_pipeline(recipe, Path(out), settings, figures)
    Console().print(f"wrote {path}", soft_wrap=True)
    return str(path)


def _source(
    run: str | None, pipeline: str | None, data: DictConfig | None, steps: int | None
) -> tuple[Data, Sampler, Networks | None]:
    """Data, sampler and (for a run) networks that sample and evaluate were pointed at."""
    if (run is None) == (pipeline is None):
        raise UserError(
            "run, pipeline", "must be given one or the other", f"run={run} pipeline={pipeline}", "Give one."
        )
    if run is not None:
        recipe, _ = load_run(run)
        chosen: Data = recipe.data if data is None else build(data)
        if chosen.shape != recipe.data.shape:
            raise UserError(
                "data", f"must have the run's sample shape {recipe.data.shape}", chosen.shape, "Leave it out."
            )
        return chosen, with_steps(recipe.distiller.generator, steps), recipe.networks
    if data is None:
        raise UserError("data", "must say what the pipeline generates", None, "Add data=digits, for example.")
    return build(data), PipelineSampler.load(str(pipeline), steps), None


def _new_file(key: str, path: str) -> Path:
    """A path whose folder exists and that is no folder itself."""
    file = Path(path)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UserError(key, "must name a file in an existing folder", path, "Make the folder, or name a file.")
    return file


def _accelerator(precision: str | None) -> Accelerator:
    if precision is None:
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    AcceleratorState._reset_state()  # a second run of this process may ask for another precision
    accelerator = Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[precision])
    if accelerator.num_processes > 1:
        raise UserError(
            "accelerate launch", "trains on one process so far", accelerator.num_processes, "Start one process."
        )
    return accelerator


@functools.cache
def _file_sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _card(networks: Mapping[str, Any]) -> tuple[Path, str]:
    """Where the teacher's card lies and the hash of its weights."""
    folder = Path(resolve(str(networks.get("path", ""))))
    weights = next(iter(sorted(folder.glob("*.safetensors"))), None) if networks.get("path") else None
    if weights is None:
        raise UserError(
            "evaluation.teacher", "card needs shipped weights", networks.get("_target_"), "Set it to fresh or none."
        )
    return folder / "metrics.json", _file_sha256(weights)
