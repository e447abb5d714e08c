"""Hydra's and OmegaConf's exceptions as one message: key, constraint, value, fix."""

from __future__ import annotations

import contextlib
import errno
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError, safe_load

from . import config_files
from .config_check import NODE_WORDS
from .config_types import did_you_mean, short
from .errors import UserError

_QUOTED = "'key=[1,2]' or 'key=\"a, b\"'."


# What Hydra itself lets through for some overrides, as an assertion for +group=${other}.
_HYDRAS = (ValueError, TypeError, KeyError, AssertionError)


def explain(error: BaseException, verb: str, overrides: Sequence[str]) -> UserError | None:
    """The message for a mistake in `overrides` of `verb` that composing ran into; None if it is not one."""
    if isinstance(error, OverrideParseException):
        word = error.override
        fix = (
            f"Write for example {some_key(verb)}; quote values that hold more than letters, digits and signs: {_QUOTED}"
        )
        given = short(first_line(error.message)) if "=" in word else "a word without ="
        return UserError(short(repr(word)), "must be a key=value override", given, fix)
    if isinstance(error, MissingConfigException):
        return _unknown_option(error, verb)
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = Path(str(error.filename)).stem
        return UserError("a name", "must be one that a file can have", short(repr(name)), "Shorten it.")
    if type(error) is ValueError and "Config group override must be" in str(error):
        return _no_name(overrides)
    if type(error) is TypeError and any(isinstance(_plain(text), list) for text in overrides):
        return _no_name(overrides)  # Hydra looks for names in the list
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, ConfigCompositionException):
        for pattern, make in _COMPOSITION:
            found = re.search(pattern, f"{error}\n{cause}", re.DOTALL)
            if found:
                return make(found, verb, overrides)
    if isinstance(cause, OmegaConfBaseException):
        return _omegaconf(cause, overrides)
    if isinstance(error, (HydraException, YAMLError)) or type(error) in _HYDRAS:
        text = " ".join(str(error).split()) or "Hydra cannot."
        return UserError("the command line", "must compose to one configuration", _given(overrides), text)
    return None


def _given(overrides: Sequence[str]) -> str:
    return short(" ".join(text for text in overrides if not text.startswith("hydra.searchpath=")) or "nothing")


def first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0].strip()


def value_of(key: str, overrides: Sequence[str]) -> str:
    """What the overrides set `key` to, as written."""
    for text in reversed(overrides):
        name, equals, value = text.lstrip("+~").partition("=")
        if name == key and equals:
            return short(value) or "''"
    return "nothing"


# --- known names, for the fixes


def known_keys(verb: str, overrides: Sequence[str]) -> list[str]:
    """The dotted keys of the verb's configuration under those overrides that choose a group option."""
    names = (*config_files.groups(), "hydra.searchpath")
    chosen = (text for text in overrides if text.lstrip("+~").partition("=")[0] in names)
    return _keys_under(config_files.PACKAGE, verb, tuple(chosen))


@functools.lru_cache(maxsize=64)
def _keys_under(package: str, verb: str, chosen: tuple[str, ...]) -> list[str]:
    try:
        cfg = config_files.composed(verb, chosen)
    except Exception:
        return []  # the choice of groups is itself at fault, and is reported
    choices = [str(name) for name in cfg.hydra.runtime.choices if not str(name).startswith("hydra/")]
    del cfg._content["hydra"]  # type: ignore[union-attr]
    with contextlib.suppress(OmegaConfBaseException):
        OmegaConf.resolve(cfg)
    return sorted({*choices, *_dotted(cfg, "")})


def _dotted(node: DictConfig, prefix: str) -> Iterator[str]:
    for name in map(str, node):
        key = f"{prefix}{name}"
        yield key
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _dotted(child, f"{key}.")


def some_key(verb: str) -> str:
    return {"sample": "num=64", "evaluate": "num_samples=10000", "export": "out=DIR"}.get(verb, "run_dir=runs/x")


# --- one function per kind of mistake


def _unknown_option(error: MissingConfigException, verb: str) -> UserError:
    path = error.missing_cfg_file or verb
    group, _, name = path.rpartition("/")
    if not group:
        return UserError("the configuration", "must exist", path, first_line(error))
    options = list(error.options or config_files.groups().get(group, []))
    if not options:
        return UserError(group, "must be one of the options of its group, which has none", name, "Leave it out.")
    where = re.match(r"In '(\w+/[^']+)'", str(error))  # an experiment that names it
    constraint = f"must be one of {', '.join(options)}" + (f" (chosen in {where[1]})" if where else "")
    return UserError(group, constraint, repr(name), did_you_mean(name, options))


def _unknown_key(found: re.Match[str], verb: str, overrides: Sequence[str]) -> UserError:
    key = _inside(found)
    parent, _, last = key.rpartition(".")
    keys = [k for k in known_keys(verb, overrides) if last.startswith("_") or not k.endswith(NODE_WORDS)]
    near = [k for k in keys if k.rpartition(".")[0] == parent]
    fix = did_you_mean(key, near or [k for k in keys if "." not in k])
    if fix.startswith("Known") and last:  # the right name in another place
        elsewhere = [k for k in keys if k.rpartition(".")[2] == last]
        fix = f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else fix
    return UserError(key, f"is not a key of {verb.replace('_', ' ')}", value_of(key, overrides), fix)


def _inside(found: re.Match[str]) -> str:
    """The key at fault: where a mapping was given, Hydra names the mapping and OmegaConf the key in it."""
    full = re.search(r"full_key: (\S+)", found.string)
    return full[1] if full and full[1].startswith(f"{found[1]}.") else found[1]


def _no_name(overrides: Sequence[str]) -> UserError:
    options = config_files.groups()
    for text in overrides:
        group, _, value = text.lstrip("+~").partition("=")
        if group in options and not isinstance(_plain(text), str):
            return UserError(group, f"must be one of {', '.join(options[group])}", short(value), f"Write {group}=NAME.")
    return UserError("the choice of a group", "must be a name", _given(overrides), "Write GROUP=NAME.")


def _plain(text: str) -> object:
    """The value of an override as YAML reads it."""
    try:
        return safe_load(text.partition("=")[2])
    except YAMLError:
        return text


def _must_specify(found: re.Match[str], verb: str, overrides: Sequence[str]) -> UserError:
    key = found[1]
    options = ", ".join(config_files.groups().get(key, []))
    return UserError(key, f"must be one of {options}", "nothing", f"Add {key}=NAME.")


def _ambiguous(found: re.Match[str], verb: str, overrides: Sequence[str]) -> UserError:
    key, _, value = found[1].partition("=")
    fix = f"Write '{key}=[{value}]' for a list, or add --multirun to run once per value."
    return UserError(key, "must be one value", value, fix)


def _exists(found: re.Match[str], verb: str, overrides: Sequence[str]) -> UserError:
    key = found[1]
    return UserError(key, "exists already, without a +", f"+{key}", f"Write {key}=VALUE.")


def _cannot_delete(found: re.Match[str], verb: str, overrides: Sequence[str]) -> UserError:
    key = found[1].split("=")[0]
    keys = [k for k in known_keys(verb, overrides) if not k.endswith(NODE_WORDS)]
    return UserError(f"~{key}", "must name a key that exists", "none", did_you_mean(key, keys))


_COMPOSITION = (
    (r"Could not override '([^']+)'", _unknown_key),
    (r"Override (\S+?)@\S* looks like a config group override", _unknown_key),
    (r"force-add of config groups is not supported: '\++([^'=]+)", _exists),
    (r"You must specify '([^']+)'", _must_specify),
    (r"Error resolving interpolation '\$\{(\w+)\}'", _must_specify),
    (r"Ambiguous value for argument '(.+?)'\s", _ambiguous),
    (r"Could not append to config\. An item is already at '([^']+)'", _exists),
    (r"Could not delete from config\. '([^']+)' does not exist", _cannot_delete),
    (r"Could not delete '([^']+)'", _cannot_delete),
)


def _interpolated(overrides: Sequence[str]) -> str:
    """The first key given as ${...}: OmegaConf names none where that leads nowhere."""
    keys = [text.lstrip("+~").partition("=")[0] for text in overrides if "${" in text]
    return keys[0] if keys else "the configuration"


def _omegaconf(error: OmegaConfBaseException, overrides: Sequence[str]) -> UserError:
    key = str(error.full_key or error.key or _interpolated(overrides))
    if isinstance(error, MissingMandatoryValue):
        return UserError(key, "must be given", "nothing", f"Add {key}=...")
    value = value_of(key, overrides)
    if isinstance(error, InterpolationResolutionError):
        return UserError(key, "must refer to a key that exists", value, first_line(error.msg or error))
    return UserError(key, "must fit the configuration", value, first_line(error.msg or error))
