"""A recipe of several stages: each an ordinary run of its own, the last one the run itself.

    stages.warm.distiller: ...      what comes before, in order, in run_dir/stages/<name>
    init.student: stage:warm        what a later stage or the run takes over

A key that a stage gives replaces the run's key whole; `roles` and `init` it has only if it gives them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffdistill.config_check import check
from diffdistill.config_types import did_you_mean, show
from diffdistill.errors import UserError
from diffdistill.run_folder import RunFolder
from diffdistill.warm_start import parse

_OF_THE_RUN = ("stages", "run_dir", "resume", "dry_run", "command", "compile", "precision")


@dataclass(frozen=True)
class Part:
    """name: of the stage, empty for the run itself."""

    name: str
    folder: RunFolder
    settings: Mapping[str, Any]


def parts(settings: Mapping[str, Any], folder: RunFolder, verb: Any) -> list[Part]:
    """The stages in order and the run itself last. verb: the function whose annotations a stage's keys must fit.

    Raises UserError for a stage with an unknown key or value, or an `init` from a stage that is not before it.
    """
    found: list[Part] = []
    for name, own in (settings["stages"] or {}).items():
        key = f"stages.{name}"
        if not re.fullmatch(r"\w[\w-]*", str(name)):  # it names a folder inside run_dir
            raise UserError(key, "must be named by letters, digits, _ and -", repr(name), "Rename the stage.")
        if not isinstance(own, Mapping | DictConfig) or not own:
            raise UserError(
                key, "must be a mapping of keys of train", show(own), f"Write for example {key}.trainer=..."
            )
        legal = [word for word in settings if word not in _OF_THE_RUN]
        for word in own:
            if word not in legal:
                fix = did_you_mean(str(word), legal)
                raise UserError(f"{key}.{word}", "is not a key of a stage", show(own[word]), fix)
        merged = {**settings, "roles": {}, "init": {}, **{str(k): own[k] for k in own}, "stages": {}}
        merged["command"] = f"{settings['command']} (stage {name})"
        _fits(merged, verb, key)
        found.append(Part(str(name), RunFolder(folder.path / "stages" / str(name)), merged))
    found.append(Part("", folder, settings))
    for index, part in enumerate(found):
        _check_order(part, [before.name for before in found[:index]])
    return found


def _fits(merged: Mapping[str, Any], verb: Any, key: str) -> None:
    plain = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in merged.items()}
    try:
        check(plain, verb)
    except UserError as error:
        raise UserError(f"{key}.{error.key}", error.constraint, error.value, error.fix) from None


def _check_order(part: Part, before: list[str]) -> None:
    for role, text in (part.settings["init"] or {}).items():
        key = ".".join(filter(None, ["stages" if part.name else "", part.name, "init", str(role)]))
        for source in parse(key, str(text))[0]:
            kind, _, name = source.where.partition(":")
            if kind == "stage" and name not in before:
                fix = f"Before it: {', '.join(before)}." if before else "No stage is before it."
                raise UserError(key, "must name an earlier stage", text, fix)
