"""What sample and evaluate are pointed at: the generator of a run, or a pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from diffdistill.config import build
from diffdistill.data import Data
from diffdistill.errors import UserError
from diffdistill.networks.roles import Networks
from diffdistill.pipelines import PipelineSampler, with_steps
from diffdistill.recipe import Recipe
from diffdistill.saved_run import Choice, load_run
from diffdistill.solvers import Sampler


@dataclass(frozen=True)
class Subject:
    """A sampler with the data it imitates. recipe, settings: of a run."""

    data: Data
    sampler: Sampler
    recipe: Recipe | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def networks(self) -> Networks | None:
        return None if self.recipe is None else self.recipe.networks


def subject(
    run: str | None, pipeline: str | None, data: DictConfig | None, steps: int | None, checkpoint: Choice
) -> Subject:
    """The subject of one of run and pipeline.

    steps: network calls, None is what the generator was made for.  checkpoint: of a run.  data: for a pipeline, what
    it generates.
    """
    if (run is None) == (pipeline is None):
        raise UserError(
            "run, pipeline", "must be given one or the other", f"run={run} pipeline={pipeline}", "Give one."
        )
    if run is not None:
        return _of_run(run, data, steps, checkpoint)
    if checkpoint != "last":
        raise UserError("checkpoint", "is for a run", f"pipeline={pipeline}", "Leave it out: a pipeline has one.")
    if data is None:
        raise UserError("data", "must say what the pipeline generates", None, "Add data=digits, for example.")
    chosen: Any = build(data)
    whole = getattr(chosen, "of_pipeline", None)  # of text
    sampler = PipelineSampler.load(str(pipeline), steps)
    if whole is None:
        return Subject(chosen, sampler)
    told = whole()
    return Subject(told, replace(sampler, prompts=told.texts))


def _of_run(run: str, data: DictConfig | None, steps: int | None, checkpoint: Choice) -> Subject:
    recipe, settings = load_run(run, checkpoint)
    chosen: Any = recipe.data if data is None else build(data)
    if data is not None and hasattr(chosen, "told"):  # text, for the run's own pipeline
        chosen = chosen.told(recipe.networks.teacher, settings["networks"].get("path"))
    if chosen.shape != recipe.data.shape:
        raise UserError("data", f"must have the run's sample shape {recipe.data.shape}", chosen.shape, "Leave it out.")
    return Subject(chosen, with_steps(recipe.distiller.generator, steps), recipe, settings)
