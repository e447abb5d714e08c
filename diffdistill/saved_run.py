"""A run read back from its folder, for sampling, evaluation, export and warm starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from diffdistill import checkpoint
from diffdistill.checkpoint import Checkpoint, DamagedError
from diffdistill.config_check import check
from diffdistill.errors import UserError
from diffdistill.recipe import Recipe, assemble
from diffdistill.run_folder import RunFolder
from diffdistill.training_state import load_averaged
from diffdistill.warm_start import start

Choice = int | Literal["last", "best"]  # of a checkpoint: a step, the newest whole one, the best evaluated one
_UNREAD = ("optimizer-", "snapshot-", "method.")  # files of a checkpoint that a reader of weights needs not
_NEEDED = ("data", "networks", "sampler", "distiller", "guidance", "roles", "lora", "trainer")


def load_run(run: str, choice: Choice = "last", key: str = "run") -> tuple[Recipe, Mapping[str, Any]]:
    """A run's recipe with the averaged weights of a checkpoint, and its settings. key: what errors name.

    Raises UserError if the folder is no run, or has no such checkpoint.
    """
    folder = RunFolder(Path(run))
    settings = folder.read_config(key)
    if missing := [name for name in _NEEDED if name not in settings]:
        raise UserError(key, "must hold a whole config.yaml", f"{folder.config_file} without {missing}", "Restore it.")
    try:
        _check_nodes(settings)
        recipe = assemble(settings)
    except UserError as error:
        fix = f"{error} Restore the file, or what it names."
        raise UserError(key, "must have a config.yaml that builds", str(folder.config_file), fix) from error
    found = _chosen(folder, choice, key, stop_metric(settings))
    try:
        load_averaged(recipe.networks, found)
    except (RuntimeError, KeyError) as error:  # names or shapes of another configuration
        first = str(error).strip().splitlines()[0]
        raise UserError(key, "must hold weights that fit its config.yaml", str(found.path), first) from error
    return recipe, settings


def load_merged(run: str, other: str, share: float, choice: Choice = "last") -> tuple[Recipe, Mapping[str, Any]]:
    """As `load_run`, its student's weights replaced by (1 - share) of them and `share` of the other run's student.

    Adapters are merged first, so that either run may have trained one. choice: of a checkpoint, in both runs.
    Raises UserError, naming `merge`, if the other is no run, or has another teacher or shape.
    """
    recipe, settings = load_run(run, choice)
    second, _ = load_run(other, choice, "merge")
    whole = assemble({**{str(key): settings[key] for key in settings}, "roles": {"student": "copy"}})
    start(whole.networks, ["student"], [(recipe.networks, "student"), (second.networks, "student")], share, "merge")
    return whole, settings


def _check_nodes(settings: DictConfig) -> None:
    """Every node against the annotations of its target; the file may have been edited since the run."""

    def anything(**keys: Any) -> None: ...

    check(OmegaConf.create({key: settings[key] for key in _NEEDED}), anything)


def stop_metric(settings: Mapping[str, Any]) -> str | None:
    """The figure by which a run's best checkpoint is the best; None is the ordinary one."""
    found = OmegaConf.select(OmegaConf.create({"of": settings.get("evaluation")}), "of.stop.metric")
    return None if found is None else str(found)


def _chosen(folder: RunFolder, choice: Choice, key: str, metric: str | None) -> Checkpoint:
    if choice == "last":
        found = folder.newest(_UNREAD)
        if found is None:
            fix = "Train it to a checkpoint, or name another run."
            raise UserError(key, "must hold a checkpoint", str(folder.checkpoints), fix)
        return found
    step = folder.best_step(metric) if choice == "best" else choice
    if step is None:
        raise UserError("checkpoint", "best needs a run that evaluated itself", "none", "Use last.")
    path = folder.checkpoints / f"step-{step:08d}"
    if not path.is_dir():
        standing = [int(p.name.removeprefix("step-")) for p in checkpoint.steps(folder.checkpoints)]
        raise UserError("checkpoint", f"must be one of the steps {standing}, last or best", step, "Choose one of them.")
    try:
        return checkpoint.verified(path, _UNREAD)
    except DamagedError as error:
        raise UserError("checkpoint", f"must be whole: {error}", str(path), "Use another one, or last.") from error
