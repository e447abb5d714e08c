"""Annotations as YAML meets them: which values fit, what to call them, how to convert them."""

from __future__ import annotations

import collections.abc as abc
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, ListConfig

_SCALARS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "{key}=1"),
    float: ("a number", "{key}=0.5"),
    bool: ("true or false", "{key}=true"),
    str: ("text", "{key}=name"),
    Path: ("a path", "{key}=some/path"),
    types.NoneType: ("null", "{key}=null"),
}
_MAPPINGS = (DictConfig, dict, abc.Mapping, abc.MutableMapping)
_SEQUENCES = (ListConfig, list, tuple, abc.Sequence, abc.Iterable, abc.Collection)


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each parameter; Any for those that cannot be evaluated at run time."""
    source: Any = function.__init__ if inspect.isclass(function) else function
    try:
        hints = typing.get_type_hints(source, include_extras=True)
    except Exception:
        hints = {}
        names = getattr(inspect.unwrap(source), "__globals__", {})
        for name, annotation in getattr(source, "__annotations__", {}).items():
            try:
                hints[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
            except Exception:
                hints[name] = Any  # for example a name that is imported for type checkers only
    hints.pop("return", None)
    return hints


def arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; anything else is its own only alternative."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(arm for inner in get_args(hint) for arm in arms(inner))
    if get_origin(hint) is typing.Annotated:
        return arms(get_args(hint)[0])
    return (types.NoneType,) if hint is None else (hint,)


def form(arm: Any) -> str:
    """How values of one alternative look in YAML: any | scalar | literal | mapping | sequence | object."""
    origin = get_origin(arm) or arm
    if arm in _SCALARS:
        return "scalar"
    if origin is Literal:
        return "literal"
    if origin in _MAPPINGS:
        return "mapping"
    if origin in _SEQUENCES:
        return "sequence"
    if origin is abc.Callable or (inspect.isclass(origin) and origin not in (object, Any)):  # Any is a class from 3.11
        return "object"
    return "any"


def fits_scalar(value: Any, arm: Any) -> bool:
    """Whether a YAML scalar is of the scalar type `arm`; an integer is a number, true is neither."""
    if isinstance(value, bool):
        return arm is bool
    if arm is float:
        return isinstance(value, (int, float))
    return isinstance(value, str if arm is Path else arm)


def takes_node(arm: Any, target: Any, partial: bool) -> bool:
    """Whether a parameter can be given what calling `target` (or its functools.partial) returns."""
    if form(arm) != "object":
        return form(arm) == "any" or arm is DictConfig  # a DictConfig parameter gets the node itself
    wanted = get_origin(arm) or arm
    if partial or wanted is abc.Callable or not inspect.isclass(target):
        return True
    if getattr(wanted, "_is_protocol", False):
        return not lacking(wanted, target)
    return issubclass(target, wanted)


def methods(protocol: type) -> list[str]:
    """Names of the methods that a protocol asks for."""
    return [name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]


def lacking(protocol: type, target: type) -> list[str]:
    """Those of them that a class does not have."""
    return [name for name in methods(protocol) if not hasattr(target, name)]


def fits_call(arm: Any, target: Any, partial: bool, keywords: Iterable[str]) -> bool:
    """Whether what a node gives can be called with the arguments that Callable[[X, Y], Z] names; True for other arms.

    Counted, and compared by class where both sides name one.
    """
    wanted = get_args(arm)[0] if get_origin(arm) is abc.Callable and get_args(arm) else ...
    if wanted is ... or not isinstance(wanted, list) or (not partial and not inspect.isclass(target)):
        return True
    called = target if partial else target.__call__
    free = dict.fromkeys(keywords) if partial else {}
    try:
        bound = inspect.signature(called).bind(*([None] if not partial else []), *wanted, **free).arguments
    except TypeError:
        return False
    except ValueError:  # a compiled callable without a signature
        return True
    hints = parameters(called)
    return all(_related(value, hints.get(name, Any)) for name, value in bound.items() if name not in free)


def _related(one: Any, other: Any) -> bool:
    """Whether a value of one class may be one of the other; True where either is no plain class."""
    return not (_is_plain_class(one) and _is_plain_class(other)) or issubclass(one, other) or issubclass(other, one)


def _is_plain_class(hint: Any) -> bool:
    """A class, but no protocol, and no dict[str, int] either, which Python 3.10 takes for a class."""
    return (
        inspect.isclass(hint)
        and get_origin(hint) is None
        and hint is not Any
        and not getattr(hint, "_is_protocol", False)
    )


def item_hint(hint: Any, index: int = 0) -> Any:
    """The annotation of a container's values: of its item `index` for a tuple of fixed length."""
    for arm in arms(hint):
        args = get_args(arm)
        if form(arm) == "mapping" and len(args) == 2:
            return args[1]
        if form(arm) == "sequence" and args:
            return args[0] if fixed_length(arm) is None else args[min(index, len(args) - 1)]
    return Any


def fixed_length(arm: Any) -> int | None:
    """The number of items of tuple[X, Y]; None for other sequences."""
    args = get_args(arm)
    return len(args) if get_origin(arm) is tuple and args and args[-1] is not Ellipsis else None


def convert(value: Any, hint: Any) -> Any:
    """A checked YAML value as its annotation names it: tuples and paths have no form of their own in YAML."""
    for arm in arms(hint):
        if isinstance(value, list) and form(arm) == "sequence":
            items = [convert(item, item_hint(arm, i)) for i, item in enumerate(value)]
            return tuple(items) if (get_origin(arm) or arm) is tuple else items
        if isinstance(value, dict) and form(arm) == "mapping":
            return {name: convert(item, item_hint(arm)) for name, item in value.items()}
        if isinstance(value, str) and arm is Path and str not in arms(hint):
            return Path(value)
    return value


# --- words


def describe(hint: Any) -> str:
    """An annotation in words."""
    words = []
    for arm in arms(hint):
        shape, args = form(arm), get_args(arm)
        if shape == "scalar":
            words.append(_SCALARS[arm][0])
        elif shape == "literal":
            words.append("one of " + ", ".join(map(str, args)))
        elif shape == "sequence" and fixed_length(arm) is not None:
            words.append(f"a list of {len(args)} ({', '.join(map(describe, args))})")
        elif shape == "sequence":
            words.append("a list" + (f", each item {describe(args[0])}" if args else ""))
        elif shape == "mapping":
            words.append("a mapping" + (f", each value {describe(args[1])}" if len(args) == 2 else ""))
        elif shape == "object":
            origin = get_origin(arm) or arm
            words.append("a node whose _target_ gives a " + ("callable" if origin is abc.Callable else origin.__name__))
        else:
            words.append("anything")
    return " or ".join(dict.fromkeys(words))


def describe_call(hint: Any) -> str:
    """The arguments of the first Callable[[X, Y], Z] among the alternatives."""
    calls = [get_args(arm)[0] for arm in arms(hint) if get_origin(arm) is abc.Callable and get_args(arm)]
    return ", ".join(getattr(one, "__name__", str(one)) for one in calls[0]) if calls else ""


def example(hint: Any, key: str) -> str:
    """A fix for a value of the wrong type."""
    arm = next((arm for arm in arms(hint) if arm is not types.NoneType), types.NoneType)
    shape = form(arm)
    if shape == "scalar":
        return f"Write for example {_SCALARS[arm][1].format(key=key)}."
    if shape == "literal":
        return f"Write for example {key}={get_args(arm)[0]}."
    if shape == "sequence":
        items = ("A", "B", "C", "D", "E", "F")[: fixed_length(arm) or 2]
        return f"Write it as a list: '{key}=[{','.join(items)}]'."
    if shape == "mapping":
        return f"Set its keys one by one: {key}.NAME=VALUE."
    return f"Choose it by its group or give {key} a _target_."


def show(value: Any) -> str:
    """A value as the command line writes it, text in quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return short(repr(value))


def short(text: str) -> str:
    """At most 80 characters of a text."""
    return text if len(text) <= 80 else text[:77] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A fix: the known words nearest to this one, or all of them."""
    words = sorted(set(known))
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(words)}." if words else "None is known."


def dot(key: str, name: object) -> str:
    """The dotted key of `name` inside `key`, which is empty at the root."""
    return f"{key}.{name}" if key else str(name)
