"""One training run: the loop, what it writes into its folder, and where it goes on after an interruption."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from diffdistill import activity, checkpoint, logs, ranks, stacks
from diffdistill.activity import during
from diffdistill.checkpoint import Checkpoint
from diffdistill.compiling import Compilations, uncompiled
from diffdistill.errors import Stopped
from diffdistill.evaluation import divided, factors, harness
from diffdistill.evaluation.costs import latency_ms
from diffdistill.evaluation.course import Course, Verdict
from diffdistill.evaluation.early_stop import Reason
from diffdistill.evaluation.harness import Evaluation
from diffdistill.evaluation.health import judge, now
from diffdistill.evaluation.vitals import Health, Vitals
from diffdistill.export import refusal
from diffdistill.export import write as write_pipeline
from diffdistill.finite import spoilt
from diffdistill.machine import machine, versions
from diffdistill.recipe import Recipe
from diffdistill.run_folder import RunFolder, writing
from diffdistill.run_pictures import RunPictures
from diffdistill.saved_run import load_run
from diffdistill.shards import Gathered
from diffdistill.small_samples import spacing
from diffdistill.solvers import Sampler
from diffdistill.stopping import StopRequested, StopSignal
from diffdistill.throughput import Meter
from diffdistill.trackers import Log, Nowhere, Silent, Tracker
from diffdistill.trainer import NonFiniteError, Progress, Trainer
from diffdistill.training_state import TrainingState
from diffdistill.watchdog import Watchdog

log = logging.getLogger(__name__)
SCHEMA = 1  # of summary.json


def _ask(signal: StopSignal) -> None:
    """Leave where any process was told to stop."""
    if ranks.any_of(signal.requested):
        raise StopRequested


class Run:
    """One training run and what it writes into `folder`, which the caller holds. teacher_figures: for the summary.
    probe: what asking the teacher found, if it was asked."""

    def __init__(
        self,
        folder: RunFolder,
        settings: Mapping[str, Any],
        recipe: Recipe,
        trainer: Trainer,
        evaluation: Evaluation | None,
        teacher_figures: dict[str, Any],
        made: Mapping[str, Any] | None = None,
        health: Health | None = None,
        watchdog: Watchdog | None = None,
        tracker: Tracker | None = None,
        probe: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.settings, self.recipe, self.trainer = folder, settings, recipe, trainer
        self.evaluation, self.teacher_figures, self.made = evaluation, teacher_figures, dict(made or {})
        self.health, self.alarms = health, dict[str, Verdict]()
        self.tracker: Tracker = tracker or Nowhere()
        self.tracked: Log = Silent()
        self.probe, self.pictures = probe, RunPictures(folder, recipe)
        self.enough: Reason | None = None  # why training ended before its steps were over
        self.watchdog = watchdog or Watchdog(None)
        self.console = logs.console()
        self.alone = ranks.place()[1] == 1
        self.compilations = None if settings["compile"] is False else Compilations()

    def execute(self, accelerator: Accelerator, start: Checkpoint | None) -> dict[str, Any]:
        """Train from `start`, or from the beginning, then evaluate, export and print the summary.

        Raises Stopped after SIGTERM or Ctrl-C, with everything saved.
        """
        state = self.trainer.start(self.recipe.distiller, self.recipe.networks)
        state.made_cpu_seconds = sum(made["cpu_seconds"] for made in self.made.values())
        if start is not None:
            ranks.together(lambda: state.load(start))
            self.console.print(f"going on after step {state.step} of {self.trainer.steps}")
        signal = StopSignal()
        with signal.watching(), writing(self.folder.path), ExitStack() as stack:
            ranks.on_main(lambda: self._open(state.step))
            activity.ended(state.step)
            if ranks.is_main():
                stack.enter_context(self._tracked(state.step))
            try:
                with stacks.into(self.folder.path) as dump, self.watchdog.watching(dump):
                    self._train(state, accelerator, signal)
                    summary = self._conclude(state, signal)
            except StopRequested:
                signal.signal = next(one for one in ranks.all_say(signal.signal) if one is not None)
                done = self.trainer.ended(state) or self.enough is not None
                left = "evaluation and export" if done else "training"
                self.console.print(
                    f"stopped by {signal.signal.name} after step {state.step}, saved; {left} goes on with "
                    f"resume=true run_dir={self.folder.path}",
                    soft_wrap=True,
                    highlight=False,
                )
                raise Stopped(signal.status) from None
            except NonFiniteError as error:
                self._log(state.step + 1, {"failed": str(error)})  # for `doctor`; dropped if it goes on
                raise
        with signal.watching():
            self.pictures.report(state.step, self._at_once(signal))
        if ranks.is_main():
            self._print(summary)
        return summary

    def _train(self, state: TrainingState, accelerator: Accelerator, signal: StopSignal) -> None:
        recipe = self.recipe
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("training", total=self.trainer.steps, completed=state.step)
            samples = self.trainer.batch_size * self.trainer.accumulate * logs.world()
            meter = Meter(samples, state.step, state.seconds)

            def log(step: int, figures: Mapping[str, float]) -> None:
                compiled = {} if self.compilations is None else self.compilations.figures()
                self._log(step, {**figures, **meter.figures(step, state.seconds), **compiled})
                shown = [f"{k} {v:.3g}" for k, v in figures.items() if "/" in k and not k.startswith(("lr", "time"))]
                bar.update(task, completed=step, description="  ".join(shown[:3]))

            def evaluate(step: int) -> None:
                with suppress(StopRequested):  # the loop asks next, and saves a step whose evaluation is missing
                    self._evaluate_interim(step, signal)

            def stop() -> bool:
                return signal.requested or self.enough is not None

            progress = Progress(log, lambda step: self._save(state), evaluate, stop)
            vitals = None
            if self.health is not None:
                vitals = Vitals(self.health, recipe, self.trainer.batch_size, accelerator.autocast)
                progress.before = lambda step: vitals.before(state)

            def after(step: int) -> None:
                activity.ended(step)
                if self.compilations is not None and (text := self.compilations.look().alarm(step)) is not None:
                    self.console.print(text, soft_wrap=True, highlight=False)
                with during("health"):
                    if vitals is not None:
                        self._watch(vitals, state)
                    if step % spacing(self.trainer.steps) == 0:
                        self.pictures.keep(step)

            progress.after = after
            if state.step == 0:
                self.pictures.keep(0)
            every = self.evaluation.every if self.evaluation else 0
            owed = every and state.step and not self.trainer.ended(state) and state.step % every == 0
            if owed and not ranks.on_main(lambda: self.folder.was_evaluated(state.step)):  # a signal had cut it short
                evaluate(state.step)
            self.enough = ranks.on_main(self._enough)
            if self.enough is None:  # else the run was cut short after it had ended
                self.trainer.fit(state, recipe.data, recipe.needs, accelerator, progress, every)
        _ask(signal)

    @contextmanager
    def _tracked(self, step: int) -> Iterator[None]:
        """Between the tracker's beginning, or going on after `step`, and its end."""
        path = self.folder.path
        name = f"{path.parent.parent.name}/{path.name}" if path.parent.name == "stages" else path.name
        config: Any = OmegaConf.to_container(OmegaConf.create(dict(self.settings)))
        tell = functools.partial(self.console.print, soft_wrap=True, highlight=False)
        self.tracked = self.tracker.open(path, name, config, step, tell)
        try:
            yield
        finally:
            self.tracked.close()

    def _log(self, step: int, figures: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, written by the main process, and to the tracker."""
        if ranks.is_main():
            self.folder.add_metrics(step, figures)
            self.tracked.figures(step, figures)

    def _open(self, step: int) -> None:
        """Make the folder what it was at `step`: metrics cut, what a kill left half done removed."""
        (self.folder.path / "samples").mkdir(exist_ok=True)
        if not self.folder.config_file.is_file():
            self.folder.write_config(self.settings)
        self.folder.cut_metrics(step)
        checkpoint.clean(self.folder.checkpoints)
        checkpoint.set_aside(self.folder.checkpoints, step)
        for path in [self.folder.path / "pipeline", *self.folder.path.glob(".pipeline-*")]:
            shutil.rmtree(path, ignore_errors=True)
        self.folder.add_start(step, {"machine": machine(), "versions": versions(), "probe": self.probe})

    @during("save")
    def _save(self, state: TrainingState) -> None:
        """A checkpoint of the whole state, whatever part of it each process holds."""
        ranks.together(lambda: self._refuse_spoilt(state))
        files = Gathered(state.tensors(), ranks.is_main())
        ranks.on_main(lambda: self._commit(state, files), meanwhile=files)

    def _refuse_spoilt(self, state: TrainingState) -> None:
        """Raise NonFiniteError for what would be taken up by resume."""
        if (found := spoilt(state.networks, state.optimizers)) is not None:
            raise NonFiniteError(*found, state.step)

    def _commit(self, state: TrainingState, files: Gathered) -> None:
        metrics = self.folder.path / "metrics.jsonl"
        if metrics.is_file():  # the lines up to here belong to the checkpoint
            with metrics.open() as file:
                os.fsync(file.fileno())
        folder = self.folder.checkpoints
        checkpoint.commit(folder, state.step, files, state.values())
        log.debug(f"saved the checkpoint of step {state.step}")
        metric = None if self.evaluation is None else self.evaluation.stop_metric
        checkpoint.prune(folder, self.trainer.keep, self.folder.best_step(metric))

    def _enough(self) -> Reason | None:
        """Why training ends before its steps are over, from the evaluations in the folder; None if it does not."""
        if self.evaluation is None or self.evaluation.stop is None:
            return None
        return self.evaluation.stop.reason(self.folder.metrics())

    def _watch(self, vitals: Vitals, state: TrainingState) -> None:
        """Measure, write, and tell what is new and bad."""
        figures = vitals.after(state)
        if not figures or not ranks.is_main():
            return
        self._log(state.step, figures)
        for verdict in now(Course(list(self.folder.metrics()), self.trainer.steps)):
            if verdict.state == "alarm" and verdict.name not in self.alarms:
                self.alarms[verdict.name] = verdict
                text = f"alarm at step {state.step}: {verdict.line}"
                self.console.print(text, soft_wrap=True, highlight=False, style="bold red")

    @during("evaluate")
    @uncompiled()
    def _evaluate_interim(self, step: int, signal: StopSignal) -> None:
        assert self.evaluation is not None
        self.recipe.networks.train_only(())  # no dropout; the next phase chooses its own
        with self.recipe.networks.averaged(), self._at_once(signal):
            self._picture(step)
            figures, _ = self._figures(self.recipe.distiller.generator, harness.interim(self.evaluation), signal)
        self._log(step, {f"evaluation/{k}": v for k, v in figures.items()})
        self.enough = ranks.on_main(self._enough)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float))
        self.console.print(f"step {step}: {shown}")

    def _at_once(self, signal: StopSignal) -> AbstractContextManager[None]:
        """Where the signal ends long work; several processes ask each other between batches instead."""
        return signal.at_once() if self.alone else nullcontext()

    def _figures(self, sampler: Sampler, evaluation: Evaluation, signal: StopSignal) -> tuple[dict[str, Any], Any]:
        """Figures and protocol of a sampler; of several processes' samples without its latency."""
        data, networks = self.recipe.data, self.recipe.networks
        if self.alone:
            return harness.evaluate(sampler, data, evaluation, networks.device, networks.dtype)
        between = functools.partial(_ask, signal)
        drawn = divided.draw(
            sampler, data, evaluation.num_samples, evaluation.seed, evaluation.batch_size, networks.device,
            networks.dtype, between,
        )  # fmt: skip

        def judged() -> tuple[dict[str, Any], Any]:
            assert drawn is not None
            with signal.at_once():
                return harness.judged(*drawn, sampler.nfe, data, evaluation)

        return ranks.on_main(judged)

    def _picture(self, step: int) -> None:
        path = self.pictures.grid(step)
        if ranks.is_main():
            self.tracked.picture(step, "samples", path)

    @uncompiled()
    def _conclude(self, state: TrainingState, signal: StopSignal) -> dict[str, Any]:
        recipe = self.recipe
        summary: dict[str, Any] = {"schema": SCHEMA, "teacher": self.teacher_figures, "student": {}}
        self.pictures.keep(state.step)
        with recipe.networks.averaged(), self._at_once(signal), during("evaluate"):
            self._picture(state.step)
            if self.evaluation is not None:
                self.console.print(f"evaluating on {self.evaluation.num_samples} samples ...")
                summary["student"], protocol = self._figures(recipe.distiller.generator, self.evaluation, signal)
                summary["protocol"] = protocol.to_json()
                if self.evaluation.teacher == "fresh":
                    summary["teacher"], _ = self._figures(recipe.sampler, self.evaluation, signal)
            if self.alone:
                self._ship(recipe, summary)
        if not self.alone:
            _ask(signal)
        return ranks.on_main(lambda: self._finish(state, summary, signal))

    def _finish(self, state: TrainingState, summary: dict[str, Any], signal: StopSignal) -> dict[str, Any]:
        """Export, write and tell, on the main process."""
        if not self.alone:
            with signal.at_once():  # the networks here are sharded: those in the folder are whole
                whole = load_run(str(self.folder.path))[0]
                if "latency" in self._names():
                    summary["student"]["latency_ms"] = latency_ms(whole.distiller.generator, whole.data)
                self._ship(whole, summary)
        summary |= {
            "wall_seconds": round(state.seconds, 2),
            "cpu_seconds": round(state.cpu_seconds, 2),
            "iterations": state.step,
            "peak_memory_bytes": state.peak_bytes,
        }
        summary |= self.made
        if self.compilations is not None:
            summary["compile"] = self.compilations.look().to_json()
        if self.enough is not None:
            summary["early_stop"] = asdict(self.enough)
        course = Course(list(self.folder.metrics()), self.trainer.steps)
        if course.keys("health/"):
            summary["health"] = [asdict(verdict) for verdict in judge(course)]
        self.folder.write_summary(summary)
        self.tracked.figures(state.step, {f"evaluation/{key}": value for key, value in summary["student"].items()})
        return summary

    def _names(self) -> tuple[str, ...]:
        """Of the metrics measured at the end."""
        return () if self.evaluation is None else self.evaluation.names(self.recipe.data)

    def _ship(self, recipe: Recipe, summary: dict[str, Any]) -> None:
        """Write the pipeline, and what fewer steps save; the recipe's networks hold their averages."""
        if self.evaluation is not None and self.evaluation.factors:
            self.console.print("timing steps and attention ...")
            summary["factors"] = factors.report(recipe, self.evaluation, summary, self.folder.path)["factors"]
        reason = refusal(recipe)
        if reason is None:
            with during("export"):
                write_pipeline(recipe, self.folder.path / "pipeline", self.settings, summary)
        else:
            self.console.print(f"no pipeline was written: {reason}", soft_wrap=True)
            summary["no_pipeline"] = str(reason)

    def _print(self, summary: Mapping[str, Any]) -> None:
        columns = [(name, summary[name]) for name in ("teacher", "student") if summary[name]]
        if columns:
            self.console.print(harness.table(columns))
        if "early_stop" in summary:
            stop = summary["early_stop"]
            text = f"ended early: {stop['metric']} {stop['why']}; evaluated and exported as it was then"
            if stop["best_step"] != stop["step"]:
                text += ", checkpoint=best is the best one's"
            self.console.print(text, soft_wrap=True, highlight=False)
        elif (done := summary["iterations"]) < self.trainer.steps:
            self.console.print(f"ended by trainer.cpu_seconds after {done} of {self.trainer.steps} steps")
        self.console.print(
            f"trained {summary['iterations']} steps in {summary['wall_seconds']} s; "
            f"peak live tensors {summary['peak_memory_bytes'] / 2**20:.1f} MiB"
        )
        self._print_health(summary.get("health"))
        self.console.print("look at next:")
        folder = self.folder.path
        picture = max((folder / "samples").glob("step-*.png"))
        names = ("report.html", "summary.json", "factors.md", "pipeline")
        for path in (picture, *(folder / name for name in names)):
            if not path.exists():
                continue
            self.console.print(f"  {path}", soft_wrap=True, highlight=False)

    def _print_health(self, verdicts: list[dict[str, Any]] | None) -> None:
        if verdicts is None:
            return
        alarms = [Verdict(**verdict) for verdict in verdicts if verdict["state"] == "alarm"]
        for alarm in alarms:
            text = f"alarm since step {alarm.step}: {alarm.line}"
            self.console.print(text, soft_wrap=True, highlight=False, style="bold red")
        if not alarms:
            known = sum(verdict["state"] == "well" for verdict in verdicts)
            self.console.print(f"health: no alarm, {known} signs judged")
