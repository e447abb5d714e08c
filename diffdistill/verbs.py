"""The verbs sample, evaluate and export: from a run or a pipeline folder to a picture, figures, another folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from rich.console import Console

from diffdistill import export_lora
from diffdistill.adapter_file import write_adapters
from diffdistill.config import build
from diffdistill.data import Data
from diffdistill.errors import UserError
from diffdistill.evaluation import harness, plots
from diffdistill.evaluation.harness import Evaluation
from diffdistill.export import write as write_pipeline
from diffdistill.networks.roles import Networks
from diffdistill.pictures import draw_picture, where
from diffdistill.pipelines import PipelineSampler, with_steps
from diffdistill.run_folder import new_file, read_json, writing
from diffdistill.saved_run import Choice, load_merged, load_run
from diffdistill.solvers import Sampler

SCHEMA = 1
_ELSEWHERE = "Name another place, or make room."


def sample(
    run: str | None,
    pipeline: str | None,
    num: int,
    steps: int | None,
    checkpoint: int | Literal["last", "best"],
    seed: int,
    out: str,
    data: DictConfig | None = None,
) -> str:
    """Draw num samples of a run or a pipeline folder into the picture `out`; returns its path.

    steps: network calls, None is what the generator was made for.  checkpoint: of a run.  data: for a pipeline, what
    it generates.
    """
    if num < 1:
        raise UserError("num", "must be >= 1", num, "Ask for at least one sample.")
    picture = new_file("out", out)
    plots.check_picture(out)
    set_, sampler, networks = _source(run, pipeline, data, steps, checkpoint)
    with torch.no_grad(), writing(out, "out", _ELSEWHERE):
        draw_picture(set_, sampler, num, seed, picture, networks)
    Console().print(f"{num} samples, {sampler.nfe} network evaluations each: {out}", soft_wrap=True)
    return out


def evaluate(
    run: str | None,
    pipeline: str | None,
    metrics: tuple[str, ...] | None,
    num_samples: int,
    steps: int | None,
    checkpoint: int | Literal["last", "best"],
    seed: int,
    batch_size: int,
    replicates: int,
    prdc_space: Literal["values", "features"],
    out: str | None,
    data: DictConfig | None = None,
) -> dict[str, Any]:
    """Measure num_samples samples of a run or a pipeline folder; returns and optionally writes figures and protocol."""
    if metrics == ():
        raise UserError("metrics", "must name a metric", "[]", "Leave it out for those that fit the data.")
    if out is not None:
        new_file("out", out)
    judge = Evaluation(0, num_samples, num_samples, metrics, seed, batch_size, replicates, "none", prdc_space)
    set_, sampler, networks = _source(run, pipeline, data, steps, checkpoint)
    judge.check(set_)
    figures, protocol = harness.evaluate(sampler, set_, judge, *where(networks))
    Console().print(harness.table([(run or pipeline or "", figures)]))
    result = {"schema": SCHEMA, "source": run or pipeline, "figures": figures, "protocol": protocol.to_json()}
    if out is not None:
        with writing(out, "out", _ELSEWHERE):
            Path(out).write_text(json.dumps(result, indent=1) + "\n")
    return result


def export(
    run: str,
    out: str,
    checkpoint: int | Literal["last", "best"],
    steps: int | None,
    merge: str | None,
    merge_weight: float,
    format: Literal["pipeline", "lora", "adapter"],
) -> str:
    """Write a run's generator as a stock diffusers folder, verified; returns its path.

    steps: network calls, None is what the generator was made for.  merge: a second run of the same teacher; the
    student is (1 - merge_weight) of the first one's weights and merge_weight of the second one's.
    """
    if not 0 <= merge_weight <= 1:
        fix = "0 is the run itself, 1 the one that merge names."
        raise UserError("merge_weight", "must lie in [0, 1]", merge_weight, fix)
    if Path(out).exists() or Path(out).is_symlink():
        raise UserError("out", "must not exist yet", out, "Name another folder.")
    if merge is None:
        recipe, settings = load_run(run, checkpoint)
    else:
        recipe, settings = load_merged(run, merge, merge_weight, checkpoint)
    generator = with_steps(recipe.distiller.generator, steps)
    summary = Path(run) / "summary.json"
    same = checkpoint == "last" and generator.nfe == recipe.distiller.generator.nfe
    # the figures are of the last weights and the run's own steps
    figures = read_json(summary, "run") if summary.is_file() and same and merge is None else {}
    if merge is not None:
        figures = {"merged": {"run": merge, "weight": merge_weight}}
    if format != "pipeline" and merge is not None:
        raise UserError("merge", f"must be null for format={format}", merge, "Merge pipelines, or export one run's.")
    with writing(out, "out", _ELSEWHERE):
        if format == "adapter":
            path = write_adapters(recipe, Path(out), settings)
        elif format == "lora":
            path = export_lora.write(recipe, Path(out), settings, figures, generator)
        else:
            path = write_pipeline(recipe, Path(out), settings, figures, generator)
    Console().print(f"wrote {path}", soft_wrap=True)
    return str(path)


def _source(
    run: str | None, pipeline: str | None, data: DictConfig | None, steps: int | None, checkpoint: Choice
) -> tuple[Data, Sampler, Networks | None]:
    """Data, sampler and (for a run) networks that sample and evaluate were pointed at."""
    if (run is None) == (pipeline is None):
        raise UserError(
            "run, pipeline", "must be given one or the other", f"run={run} pipeline={pipeline}", "Give one."
        )
    if run is not None:
        recipe, settings = load_run(run, checkpoint)
        chosen: Any = recipe.data if data is None else build(data)
        if data is not None and hasattr(chosen, "told"):  # text, for the run's own pipeline
            chosen = chosen.told(recipe.networks.teacher, settings["networks"].get("path"))
        if chosen.shape != recipe.data.shape:
            raise UserError(
                "data", f"must have the run's sample shape {recipe.data.shape}", chosen.shape, "Leave it out."
            )
        return chosen, with_steps(recipe.distiller.generator, steps), recipe.networks
    if checkpoint != "last":
        raise UserError("checkpoint", "is for a run", f"pipeline={pipeline}", "Leave it out: a pipeline has one.")
    if data is None:
        raise UserError("data", "must say what the pipeline generates", None, "Add data=digits, for example.")
    chosen = build(data)
    whole = getattr(chosen, "of_pipeline", None)  # of text
    if whole is None:
        return chosen, PipelineSampler.load(str(pipeline), steps), None
    told = whole()
    return told, replace(PipelineSampler.load(str(pipeline), steps), prompts=told.texts), None
