"""Every key of every shipped configuration file with its annotation, for tests that must not keep a list of them."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from tiny_families import TINY

from diffdistill import config_files
from diffdistill.cli import VERBS, function_of, main
from diffdistill.config_check import NODE_WORDS, is_node, locate
from diffdistill.config_errors import first_line
from diffdistill.config_types import arms, dot, item_hint, parameters

# A valid value for each key that a shipped file leaves open (???); IMAGES stands for a folder of images, beside which
# lie tiny pipelines of every family, latents for each, and a file of prompts.
MANDATORY = {
    "run": "FINISHED", "out": "exported", "data.path": "IMAGES", "networks.path": "asset:digits",
    "path": "IMAGES/../captioned", "model": "IMAGES/../families/sd15", "prompts": "IMAGES/../prompts.txt",
    "pipeline": "asset:shapes_t2i",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key as a user of one command line meets it.

    verb, words: the command line that reaches it.  name: dotted.  value: what the files give it.  hint: annotation of
    the parameter it becomes.  owner: qualified name of the function or class it is given to; "" inside containers.
    """

    verb: str
    words: tuple[str, ...]
    name: str
    value: Any
    hint: Any
    owner: str

    @property
    def names(self) -> tuple[str, ...]:
        """What tables may call it, the most special first: Owner.word, verb.word, outer.word, word."""
        outer, _, last = self.name.rpartition(".")
        owner = self.owner.rpartition(".")[2]
        special = (f"{owner}.{last}", f"{outer.rpartition('.')[2]}.{last}") if outer else (f"{self.verb}.{last}",)
        return (*special, last)


@functools.cache  # each is composed to find its open keys
def command_lines() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Verb and overrides that together read every shipped file: each option of each group, beside fitting others.

    FINISHED stands for the folder of a finished run.
    """
    return tuple(
        (verb, (*words, *(f"{key}={_given(key, words)}" for key in _open_keys(verb, words))))
        for verb, words in _choices()
    )


def _given(key: str, words: tuple[str, ...]) -> str:
    told = any(word.startswith("experiment=t2i_") for word in words)
    family = "sd15" if told else next((name for name in TINY if f"networks={name}" in words), None)
    if family is None or key not in ("data.path", "networks.path"):
        return MANDATORY[key]
    if key == "networks.path":
        return f"IMAGES/../families/{family}"
    return "IMAGES/../prompts.txt" if told or "data=prompts" in words else f"IMAGES/../latents/{family}"


def _choices() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "demo", ("dry_run=true",)
    yield from (("sample", ("run=FINISHED",)), ("evaluate", ("run=FINISHED",)), ("export", ()), ("doctor", ()))
    yield from (("report", ("run=FINISHED",)),)
    yield from (
        ("bench step", ()),
        ("bench pipeline", ()),
        ("bench attention", ()),
        ("train", ("experiment=gmm2d_dmd2",)),
    )  # points are quick
    yield from (("precompute", ("networks=sd15",)), ("distill", ()), ("plan", ()))
    yield "compare", ("data=gmm2d", "budget.iterations=1", "distillers=[sid]", "out=new", "dry_run=true")
    groups = config_files.groups()
    for group, options in groups.items():
        for option in options:
            yield "train", (*_beside(group, option, groups), f"{group}={option}")
    for option in sorted({*groups["data"]} - {"prompts", "latents"}):  # nobody sees those
        for verb in ("sample", "evaluate"):
            yield verb, ("pipeline=nowhere", f"data={option}")


def _beside(group: str, option: str, groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The choices without which an option of a group does not fit."""
    if group == "experiment":
        return ("data=gmm2d",) if option == "none" else ()
    if option in ("prompts", "latents"):
        return ("networks=sd15", "evaluation=none")
    if option in ("transformer_50m", "unet_100m"):
        return ("data=noise", "evaluation=none")
    if option == "noise":
        return ("networks=unet_100m", "evaluation=none")
    if group == "data":
        return ("evaluation=none", *(["distiller=denoising"] if option == "gauss_exact" else []))
    if group == "networks" and option in TINY:
        return ("data=latents", "evaluation=none")
    if group == "networks":
        data = max((name for name in groups["data"] if option.startswith(name)), key=len, default="digits")
        return (f"data={data}", "evaluation=none")
    if "/" in group:  # of one option of the outer group: the one whose defaults name the inner group
        outer, _, inner = group.partition("/")
        owner = next(name for name in groups[outer] if f"- {inner}:" in config_files.text(f"{outer}/{name}"))
        return ("data=gmm2d", "evaluation.teacher=none", f"{outer}={owner}")
    return ("data=gmm2d", "evaluation.teacher=none")


def _open_keys(verb: str, words: tuple[str, ...]) -> list[str]:
    """The keys that must be given beside these words."""
    cfg = config_files.composed(VERBS[verb].config, _prepared(verb, words))
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    del plain["hydra"]
    return sorted(_open(plain, ""))


def _open(node: dict[Any, Any], key: str) -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _open(value, dot(key, name))
        elif value == "???":
            yield dot(key, name)


@functools.cache
def composed(verb: str, words: tuple[str, ...]) -> DictConfig:
    from diffdistill.config import compose

    return compose(VERBS[verb].config, words)


def keys(verb: str, words: tuple[str, ...]) -> list[Key]:
    """The keys of one command line's configuration."""
    plain = OmegaConf.to_container(composed(verb, words))
    assert isinstance(plain, dict)
    return list(_walk(verb, words, plain, function_of(VERBS[verb]), ""))


def _walk(
    verb: str, words: tuple[str, ...], node: dict[Any, Any], function: Callable[..., Any], key: str
) -> Iterator[Key]:
    hints = parameters(function)
    owner = f"{function.__module__}.{function.__qualname__}"
    for name, value in node.items():
        hint = {"_target_": str, "_partial_": bool}.get(name, hints.get(name, Any))
        yield from _one(verb, words, dot(key, name), value, hint, owner)


def _one(verb: str, words: tuple[str, ...], key: str, value: Any, hint: Any, owner: str) -> Iterator[Key]:
    yield Key(verb, words, key, value, hint, owner)
    if is_node(value):
        yield from _walk(verb, words, value, locate(value["_target_"], key), key)
    elif (model := _MODELS.get(owner.rpartition(".")[2])) and key.endswith(".config"):  # keywords of its class
        yield from _walk(verb, words, value, locate(f"diffusers.{model}", key), key)
    elif isinstance(value, dict):
        for name, item in value.items():
            inner = _INSIDE.get(dot(key, name), item_hint(next(iter(arms(hint)))))
            yield from _one(verb, words, dot(key, name), item, inner, "")


# Functions that build a class of diffusers from `config`.
_MODELS = {
    "unet2d_from_config": "UNet2DModel",
    "wan_from_config": "WanTransformer3DModel",
    "stable_diffusion_from_config": "UNet2DConditionModel",
}
# Annotations of what lies in mappings that verbs take as they are.
_INSIDE = {
    "guidance.scale": float, "guidance.interval": tuple[float, float] | None,
    "guidance.convention": Literal["full", "added"],
}  # fmt: skip


def files_of(words: tuple[str, ...], verb: str) -> frozenset[str]:
    """The shipped files that a command line reads."""
    cfg = config_files.composed(VERBS[verb].config, _prepared(verb, words))
    choices = {str(k): v for k, v in cfg.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
    return frozenset(
        {VERBS[verb].config, *(f"{group.partition('@')[0]}/{option}" for group, option in choices.items() if option)}
    )


def _prepared(verb: str, words: tuple[str, ...]) -> list[str]:
    from diffdistill.config import prepared

    return prepared(VERBS[verb].config, words)


@dataclass(frozen=True)
class Outcome:
    """How a command line ended: exit status (or the exception it left), what it printed."""

    status: int | str
    out: str
    err: str

    @property
    def fault(self) -> str:
        """What breaks the promise of one message and status 2 for a mistake; empty if nothing does."""
        if self.status == 2:
            one = self.err.startswith("error: ") and self.err.count("\n") == 1 and not self.out
            return "" if one else f"not exactly one message: {self.err!r}, stdout {self.out!r}"
        if self.status == 0:
            return f"stderr of a good command: {self.err!r}" if self.err else ""
        return f"status {self.status}: {first_line(self.err)!r}"


def run(argv: Sequence[str]) -> Outcome:
    """One command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: int | str = main(argv)
        except (Exception, SystemExit) as error:
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
            status = f"{type(error).__name__}: {str(error)[:200]} at {where}"
    return Outcome(status, out.getvalue(), err.getvalue())


__all__ = ["MANDATORY", "NODE_WORDS", "Key", "Outcome", "command_lines", "composed", "files_of", "keys", "run"]
