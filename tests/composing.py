"""Composing many command lines that choose the same files: the files once, each line's values by Hydra's own function.

Reading and merging the files is nine tenths of what a command line costs before it is checked. The tests compose
thousands of lines that mostly differ in values, so they read the files once per choice of files (`conftest.py`). What
they get is what Hydra gives, errors included: `test_bad_input` compares the two. Tests of composing itself, and those
marked slow that send every line, leave it to Hydra.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from diffdistill import config_files

by_hydra = config_files.composed
_VALUE = re.compile(r"(?:\+\+?)?([A-Za-z_]\w*(?:\.\w+)*)=")


@functools.lru_cache(maxsize=256)
def _chosen(package: str, verb: str, choices: tuple[str, ...]) -> DictConfig:
    return by_hydra(verb, choices)


@functools.cache
def _groups(package: str) -> frozenset[str]:
    return frozenset(config_files.groups())


def composed(verb: str, overrides: Sequence[str]) -> DictConfig:
    """As `config_files.composed`. Lines with words that are neither choices of a group nor values go to Hydra whole."""
    package = config_files.PACKAGE
    found = [_VALUE.match(word) for word in overrides]
    if not all(found) or any(match[1].startswith("hydra") for match in found if match):
        return by_hydra(verb, overrides)
    is_choice = [match is not None and match[1] in _groups(package) for match in found]
    choices = tuple(word for word, choice in zip(overrides, is_choice, strict=True) if choice)
    cfg = copy.deepcopy(_chosen(package, verb, choices))
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    try:
        values = [value for value, choice in zip(parsed, is_choice, strict=True) if not choice]
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        cfg.hydra.overrides.task = list(overrides)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException from error
    return cfg
