"""The texts of `--help`, made from the verbs and the YAML files."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING

import yaml

from . import config_files

if TYPE_CHECKING:
    from .cli import Verb

_STATUS = """exit status:
  0  done
  1  a measured floor was missed, or a run is not well
  2  a mistake in what was asked for, told in one message
  3  the machine was too noisy to tell"""

_OVERRIDES = """overrides:
  key=value             set a key; lists as 'key=[a,b]', nothing as key=null
  group=name            choose a file of a group, for example distiller=dmd2
  --multirun key=a,b    run once per value
  --cfg job             print the composed configuration and stop

options of every verb, before or after it:
  --log-level LEVEL     debug, info, warning or error: what is told beside results (info)"""


def version() -> str:
    return f"diffdistill {metadata.version('diffdistill')}"


def overview(verbs: Mapping[str, Verb]) -> str:
    """The help of the whole command, or of a verb that has words below it."""
    width = max(map(len, verbs))
    lines = [f"  {name.ljust(width)}  {verb.summary}" for name, verb in verbs.items()]
    examples = [f"  diffdistill {verb.examples[0]}" for verb in verbs.values()]
    return "\n".join(
        [
            "usage: diffdistill VERB [key=value ...]",
            "",
            "Distil pretrained diffusion and flow models into one- or few-step generators.",
            "",
            "verbs:",
            *lines,
            "",
            "examples:",
            *examples,
            "",
            _OVERRIDES,
            "",
            "  diffdistill VERB --help lists a verb's keys, defaults and groups; --version prints the version.",
            '  eval "$(diffdistill --shell-completion install=bash)" completes verbs, keys and groups on TAB.',
            "",
            _STATUS,
        ]
    )


def verb_help(name: str, verb: Verb) -> str:
    """The help of one verb: its keys with their defaults and comments, then each group with its options."""
    root = config_files.text(verb.config)
    defaults = _defaults(root)
    lines = [f"usage: diffdistill {name} [key=value ...]", "", verb.summary[0].upper() + verb.summary[1:] + ".", ""]
    lines += ["examples:", *(f"  diffdistill {example}" for example in verb.examples), ""]
    lines += ["keys:", textwrap.indent(_keys(root), "  "), ""]
    every = config_files.groups()
    groups = {group: options for group, options in every.items() if group in defaults}
    if groups:
        lines += ["groups (the default marked *):"]
        for group, options in groups.items():
            default = _resolve(defaults[group], defaults)
            marked = ", ".join(f"{option}*" if option == default else option for option in options)
            lines += textwrap.wrap(f"{group}={marked}", 110, initial_indent="  ", subsequent_indent="      ")
            for inner in (name for name in every if name.startswith(f"{group}/")):  # of some of its options
                lines.append(f"  {inner}={', '.join(every[inner])}")
        lines += [""]
    for group in groups:
        body = _keys(config_files.text(f"{group}/{_resolve(defaults[group], defaults)}"))
        if body and group != "experiment":
            lines += [f"{group}.* of {group}={_resolve(defaults[group], defaults)}:", textwrap.indent(body, "  "), ""]
    return "\n".join([*lines, _OVERRIDES, "", _STATUS])


def _defaults(text: str) -> dict[str, str]:
    entries = (yaml.safe_load(text) or {}).get("defaults", [])
    return {group: str(name) for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _resolve(name: str, defaults: Mapping[str, str]) -> str:
    found = re.fullmatch(r"\$\{(\w+)\}", name)
    return defaults.get(found[1], name) if found else name


def _keys(text: str) -> str:
    """A YAML file without its defaults list, package line and targets: keys, values and comments as written."""
    text = re.sub(r"^defaults:.*\n(?:[ \t-].*\n|\n)*", "", text, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(# @package|_target_:|_partial_:)", line)]
    return "\n".join(lines).strip("\n")
