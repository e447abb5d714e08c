"""From names and overrides to objects: compose the YAML files of a verb, check them, build what they describe.

The command line and Jupyter share this file. `config_check` compares a configuration with the annotations of what it
will be given to; `config_errors` turns the exceptions of Hydra and OmegaConf into one message.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from . import config_files, redaction
from .config_check import NODE_WORDS, check, is_node, locate
from .config_errors import explain
from .config_types import arms, convert, dot, parameters, short, show
from .errors import UserError, refuse_url

# The keys of the verbs' own files that name a file or folder.
PATHS = ("run_dir", "run", "pipeline", "out", "merge")

# Mappings keyed by role start empty, so that roles.student=lora names a key that no file holds.
_ROLE_KEYED = re.compile(r"(?=(?:roles|init|attention|trainer\.(?:optimizer|lr|clip|ema))(?:\.\w+)?=)")


def compose(verb: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The resolved configuration of a verb: the name of a file directly under `configs/`.

    overrides: what the command line takes, for example ["data=gmm2d", "trainer.steps=100"].
    Raises UserError for every mistake in them.
    """
    return composed(verb, prepared(verb, overrides))


def composed(verb: str, words: Sequence[str]) -> DictConfig:
    """As `compose`, for overrides that are `prepared`."""
    try:
        cfg = config_files.composed(verb, words)
        return resolved(cfg, cfg.hydra)
    except Exception as error:
        message = explain(error, verb, words)
        if message is None:
            raise
        raise message from error


def prepared(verb: str, overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra needs them.

    Those of the form roles.ROLE=... may add their key. A bare `train` is the default experiment; where data, networks
    or distiller are chosen without an experiment, its settings would be another recipe's: experiment=none.
    Raises UserError for settings of Hydra's own: some of them name places to write to; and for secrets.
    """
    redaction.refuse(overrides)
    for text in overrides:
        if found := re.match(r"[~+]*(hydra(?:[./@][^=]*)?)(?:=(.*))?$", text, re.DOTALL):
            fix = "Leave it out: --multirun sweeps, --config-dir adds files, run_dir names where a run writes."
            raise UserError(found[1], "is Hydra's own, and fixed here", short(found[2] or "nothing"), fix)
    words = [_ROLE_KEYED.sub("++", text, count=1) if _ROLE_KEYED.match(text) else text for text in overrides]
    named = any(re.match(r"[~+]*experiment\b", word) for word in words)
    if verb == "train" and not named and any(re.match(r"(data|networks|distiller)=", word) for word in words):
        words.append("experiment=none")
    return words


def override(key: str, value: Any) -> str:
    """A Python value as an override: run_dir="a b" is run_dir='a b'. Groups take a bare name."""
    return f"{key}={_literal(value)}"


def gathered(words: Sequence[str], own: Collection[str]) -> list[str]:
    """Words of the command line as keys of a verb that has only its `own`: train's keys gathered in overrides."""
    others = [word for word in words if ("=" in word or word[:1] == "~") and word[:1] != "-"]
    others = [word for word in others if word.partition("=")[0] not in own]
    rest = [word for word in words if word not in others]
    return [*rest, *([override("overrides", others)] if others else [])]


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return show(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_literal, value)) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_/.][\w/.\-]*", text) and text.lower() not in ("null", "true", "false", "inf", "nan"):
        return text
    return "'" + re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", "\\'") + "'"


def resolved(cfg: DictConfig, hydra_node: DictConfig) -> DictConfig:
    """A composed configuration without Hydra's own node, its interpolations replaced, `run_dir` filled in."""
    with open_dict(cfg):
        cfg.pop("hydra", None)
    if "run_dir" in cfg and cfg.run_dir is None:
        if cfg.get("resume", False) in (True, "auto"):
            raise UserError("run_dir", "must be given to go on with a run", "null", "Add run_dir=DIR.")
        name = hydra_node.runtime.choices.get("experiment") or "run"
        cfg.run_dir = _default_run_dir(name, hydra_node.job.num if hydra_node.mode == RunMode.MULTIRUN else None)
    if "data_name" in cfg:
        if cfg.data_name is not None:
            raise UserError("data_name", "is filled in", show(cfg.data_name), "Write data=NAME.")
        cfg.data_name = hydra_node.runtime.choices.get("data")
    if "command" in cfg and cfg.command is None:
        words = [word for word in hydra_node.overrides.task if not word.startswith(("run_dir=", "dry_run=", "resume="))]
        cfg.command = " ".join(words)
    OmegaConf.resolve(cfg)
    redaction.refuse_in(OmegaConf.to_container(cfg))
    for key in PATHS:
        if isinstance(cfg.get(key), str):
            _check_path(key, cfg[key])
    return cfg


def _check_path(key: str, path: str) -> None:
    """Refuse what no file system takes for the name of a file or folder, and URLs."""
    if not path.strip():
        raise UserError(key, "must name a file or folder", show(path), f"Write {key}=NAME.")
    refuse_url(key, path)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # too long, not permitted, a loop of links, a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(key, "must be a path that can be looked at", show(path), f"{reason}.") from error


def _default_run_dir(name: str, job: int | None) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each process would read its own clock
        raise UserError("run_dir", "must be given when several processes train", "null", "Add run_dir=runs/NAME.")
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}" + ("" if job is None else f"-{job}")


def call(cfg: DictConfig, function: Callable[..., Any]) -> Any:
    """Call a verb with its root configuration's keys, after `check_verb`: mappings as DictConfig, lists as lists."""
    check_verb(cfg, function)
    hints = parameters(function)
    values = {str(key): cfg[key] for key in cfg}
    plain = {k: OmegaConf.to_container(v) if isinstance(v, ListConfig) else v for k, v in values.items()}
    return function(**{key: convert(value, hints.get(key)) for key, value in plain.items()})


def check_verb(cfg: DictConfig, function: Callable[..., Any]) -> None:
    """`check` a verb's root configuration, and that each group in it names what to build: after ~GROUP none does."""
    check(cfg, function)
    hints = parameters(function)
    for key in config_files.groups():
        node = cfg.get(key) if DictConfig in arms(hints.get(key)) else None
        if isinstance(node, DictConfig) and "_target_" not in node:
            fix = f"Choose it by its group: {key}=NAME."
            raise UserError(f"{key}._target_", "must name what to build", "nothing", fix)


def build(node: DictConfig | Mapping[str, Any] | None, **injected: Any) -> Any:
    """What a node with `_target_` describes: its target called with the node's keys, inner nodes built first.

    `_partial_: true` gives a functools.partial; `injected` keywords complete it, and then it is called.
    Lists become tuples where the parameter is annotated so. None gives None.
    Raises UserError, with the dotted key of the node in front, where a constructor raises ValueError.
    """
    if node is None:
        return None
    if isinstance(node, DictConfig):
        if "_target_" not in node:
            key = dot(node._get_full_key(None), "_target_")
            raise UserError(key, "must name what to build", "nothing", f"Add {key}=NAME, or choose its group.")
        return _build(OmegaConf.to_container(node, resolve=True), node._get_full_key(None), injected)
    return _build(dict(node), "", injected)


def _build(value: Any, key: str, injected: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_build(item, f"{key}[{i}]", {}) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    inner = {name: _build(item, dot(key, name), {}) for name, item in value.items() if name not in NODE_WORDS}
    if not is_node(value):
        return inner
    target = locate(value["_target_"], dot(key, "_target_"))
    hints = parameters(target)
    keywords = {name: convert(item, hints.get(name)) for name, item in inner.items()}
    later = value.get("_partial_", False) and not injected
    if injected and (missing := _missing(target, {*keywords, *injected})):
        full = dot(key, missing)
        raise UserError(full, f"is required by {target.__qualname__}", "nothing", f"Add {full}=VALUE.")
    try:
        if not later:
            return target(**keywords, **injected)
        if keywords and hasattr(target, "refuse"):
            target.refuse(**keywords)
    except UserError as error:
        raise _in_node(error, key, hints) from error
    except ValueError as error:
        raise RefusedError(key or value["_target_"], str(error)) from error
    # nothing bound: the function or class itself, which code may compare by identity
    return functools.partial(target, **keywords) if keywords or isinstance(target, type) else target


def _missing(target: Callable[..., Any], given: Collection[str]) -> str | None:
    """The first parameter without a default that is not given: a configuration may have left out a key of a partial."""
    for name, parameter in inspect.signature(target).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in given:
            return name
    return None


def _in_node(error: UserError, key: str, hints: Mapping[str, Any]) -> UserError:
    """The error with the dotted key of its node in front, where it names parameters of the node's target."""
    names = error.key.split(", ")
    if not key or not all(re.split(r"[.\[]", name)[0] in hints for name in names):
        return error
    return UserError(", ".join(dot(key, name) for name in names), error.constraint, error.value, error.fix)


class RefusedError(UserError):
    """A constructor's ValueError, with the dotted key of its node in front."""

    def __init__(self, key: str, text: str) -> None:
        ValueError.__init__(self, f"{key}: {text}")
        self.key, self.constraint, self.value, self.fix = key, text, None, ""
