"""The verbs sample and export: from a run or a pipeline folder to a picture, another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig
from rich.console import Console

from diffdistill import export_lora
from diffdistill.adapter_file import write_adapters
from diffdistill.errors import UserError
from diffdistill.evaluation import plots
from diffdistill.export import write as write_pipeline
from diffdistill.pictures import draw_picture
from diffdistill.pipelines import with_steps
from diffdistill.run_folder import new_file, read_json, writing
from diffdistill.saved_run import load_merged, load_run
from diffdistill.subject import subject

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
    found = subject(run, pipeline, data, steps, checkpoint)
    with torch.no_grad(), writing(out, "out", _ELSEWHERE):
        draw_picture(found.data, found.sampler, num, seed, picture, found.networks)
    Console().print(f"{num} samples, {found.sampler.nfe} network evaluations each: {out}", soft_wrap=True)
    return out


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
