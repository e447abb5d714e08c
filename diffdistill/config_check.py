"""Compare a configuration with the signatures and annotations of what it will be given to, before anything is built."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, cast, get_args

from omegaconf import DictConfig, OmegaConf

from .config_types import (
    arms,
    describe,
    describe_call,
    did_you_mean,
    dot,
    example,
    fits_call,
    fits_scalar,
    fixed_length,
    form,
    item_hint,
    lacking,
    methods,
    parameters,
    show,
    takes_node,
)
from .errors import UserError

# What a configuration may call: our own, and classes of these packages.
ALLOWED = ("diffdistill.", "torch.optim.", "torch.nn.", "diffusers.", "torchvision.transforms.")
_OF_OTHERS = ("torch.", "diffusers.", "torchvision.")
# Of our own these run verbs, compose configurations or start processes: they would reach beyond the list.
_OF_THE_PROGRAM = tuple(
    f"diffdistill.{name}."
    for name in (
        "cli", "cli_run", "cli_help", "config", "config_check", "config_files", "config_errors", "config_types",
        "launch", "verbs", "distill", "compare", "planner", "doctor", "bench", "bench_pipeline", "measurement",
        "precompute",
        "demo", "demo_page",
        "export_check", "kernels.attention.build", "kernels.attention.bench_threads",
        "kernels.attention.triton_kernels.evidence", "__main__",
    )
)  # fmt: skip
# names more packages, with commas between them: whoever runs a command allows code of their own, no configuration can
OWN_PACKAGES = "DIFFDISTILL_PACKAGES"
NODE_WORDS = ("_target_", "_partial_")


def check(cfg: DictConfig | Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise UserError unless `cfg` can be given to `function` as keywords, and each `_target_` node to its target.

    Found here: unknown keys, missing arguments (a node with `_partial_: true` may leave some to the caller),
    values that do not fit the annotation of their parameter, targets that do not exist or are not allowed.
    """
    plain = cast("dict[str, Any]", OmegaConf.to_container(cfg) if isinstance(cfg, DictConfig) else cfg)
    check_keywords(plain, function, "", complete=True)


def check_kind(node: Mapping[str, Any] | None, kinds: Sequence[type], key: str) -> None:
    """Raise UserError unless the node at `key`, if there is one, builds one of `kinds`, of which the first is named."""
    if node is None or "_target_" not in node:  # `build` tells of the second
        return
    target = locate(node["_target_"], dot(key, "_target_"))
    if node.get("_partial_", False) or not any(takes_node(kind, target, partial=False) for kind in kinds):
        given = f"a node with _target_ {node['_target_']}"
        few = lacking(kinds[0], target) if isinstance(target, type) else []
        if 0 < len(few) < len(methods(kinds[0])):  # of that kind by intention
            given += f", which has no {', no '.join(few)}"
        raise UserError(key, f"must be {describe(kinds[0])}", given, example(kinds[0], key))


def is_node(value: Any) -> bool:
    """Whether a plain value describes a call."""
    return isinstance(value, dict) and "_target_" in value


def allowed() -> tuple[str, ...]:
    """The prefixes that a `_target_` may have: ALLOWED, and the packages that the environment names."""
    own = [name.strip() for name in os.environ.get(OWN_PACKAGES, "").split(",")]
    return (*ALLOWED, *(f"{name}." for name in own if name))


def locate(target: Any, key: str) -> Callable[..., Any]:
    """The callable that the `_target_` at `key` names; UserError unless it exists in an allowed package."""
    prefixes = allowed()
    packages = ", ".join(prefix[:-1] for prefix in prefixes)
    fix = f"Name a class or function of these packages in full. {OWN_PACKAGES}=NAME in the environment adds your own."
    if not isinstance(target, str) or not target.startswith(prefixes):
        raise UserError(key, f"must lie inside {packages}", show(target), fix)
    module, rest = _longest_module(target)
    found: Any = module
    for part in rest:
        if not hasattr(found, part):
            names = [name for name in _names(found) if not name.startswith("_")]
            inside = getattr(found, "__name__", target)
            raise UserError(key, f"must exist, but {inside} has no {part!r}", show(target), did_you_mean(part, names))
        found = getattr(found, part)
    # A module that one of ours imports is reachable through it: what counts is where the callable is defined.
    if not callable(found) or not f"{getattr(found, '__module__', '')}.".startswith(prefixes):
        raise UserError(key, f"must be a class or function defined inside {packages}", show(target), fix)
    inside = f"{found.__module__}."
    if (inside.startswith(_OF_OTHERS) and not isinstance(found, type)) or inside.startswith(_OF_THE_PROGRAM):
        fix = "Name a class, or a function of this package that builds something."
        raise UserError(
            key, "must build a part of a run: a foreign function, or a verb, may run code", show(target), fix
        )
    return found


def _longest_module(target: str) -> tuple[ModuleType, list[str]]:
    """The innermost module on the dotted path, and the names after it."""
    parts = target.split(".")
    try:
        module = importlib.import_module(parts[0])
    except ModuleNotFoundError as error:
        if error.name != parts[0]:
            raise  # the package exists, but something it imports does not
        fix = "Put the folder that holds it on PYTHONPATH."
        raise UserError(OWN_PACKAGES, "must name packages that Python can import", parts[0], fix) from None
    for i in range(1, len(parts)):
        path = ".".join(parts[: i + 1])
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise  # the module exists, but something it imports does not
            return module, parts[i:]
    return module, []


def _names(thing: Any) -> list[str]:
    return [*dir(thing), *(info.name for info in pkgutil.iter_modules(getattr(thing, "__path__", [])))]


def check_keywords(values: Mapping[str, Any], function: Callable[..., Any], key: str, complete: bool = True) -> None:
    """As `check` for keywords that stand under the dotted `key`. complete: all required ones must be there."""
    signature: Mapping[str, inspect.Parameter] = {}
    try:
        signature = inspect.signature(function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    except (TypeError, ValueError):  # a compiled callable without a signature
        open_ended = True
    hints = parameters(function)
    named = {n: p for n, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    owner = getattr(function, "__qualname__", str(function))
    for name, value in values.items():
        if name in NODE_WORDS:
            continue
        full = dot(key, name)
        if name not in named and not open_ended:
            fix = did_you_mean(full, [dot(key, n) for n in named])
            raise UserError(full, f"is not a key of {owner}", show(value), fix)
        _check_value(value, hints.get(name, Any), full)
    for name, parameter in named.items():
        if complete and parameter.default is parameter.empty and name not in values:
            full = dot(key, name)
            raise UserError(full, f"is required by {owner}", "nothing", f"Add {full}=VALUE.")


def _check_value(value: Any, hint: Any, key: str) -> None:
    if is_node(value):
        target, partial = locate(value["_target_"], dot(key, "_target_")), value.get("_partial_", False)
        if not isinstance(partial, bool):
            raise UserError(dot(key, "_partial_"), "must be true or false", show(partial), "Write true or false.")
        if not any(takes_node(arm, target, partial) for arm in arms(hint)):
            given = f"a node with _target_ {value['_target_']}"
            raise UserError(key, f"must be {describe(hint)}", given, example(hint, key))
        if not any(fits_call(arm, target, partial, value.keys() - set(NODE_WORDS)) for arm in arms(hint)):
            given = f"{value['_target_']}, which takes others"
            raise UserError(key, f"must be a callable of ({describe_call(hint)})", given, example(hint, key))
        check_keywords(value, target, key, complete=not partial)
        return
    if value == "???":
        raise UserError(key, "must be given", "nothing", f"Add {key}=VALUE.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(key, "must be finite", show(value), "Give a number that is.")
    arm = _matching_arm(value, hint, key)
    for inner, item, item_arm in _items(value, arm, key):
        _check_value(item, item_arm, inner)


def _matching_arm(value: Any, hint: Any, key: str) -> Any:
    """The alternative of `hint` that `value` fits as far as can be seen without looking inside it."""
    for arm in arms(hint):
        shape = form(arm)
        if (
            shape == "any"
            or (shape == "scalar" and fits_scalar(value, arm))
            or (shape == "literal" and any(value == option and type(value) is type(option) for option in get_args(arm)))
            or (shape == "mapping" and isinstance(value, dict))
            or (shape == "sequence" and isinstance(value, list) and fixed_length(arm) in (None, len(value)))
        ):
            return arm
    raise UserError(key, f"must be {describe(hint)}", show(value), example(hint, key))


def _items(value: Any, arm: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(value, dict):
        yield from ((dot(key, name), item, item_hint(arm)) for name, item in value.items())
    elif isinstance(value, list):
        yield from ((f"{key}[{i}]", item, item_hint(arm, i)) for i, item in enumerate(value))
