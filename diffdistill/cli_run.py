"""Run a verb: composing, sweeps, --cfg and completion are Hydra's, the messages are ours."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from . import config_files
from .cli import Verb, function_of
from .config import call, check, composed, prepared, resolved
from .config_errors import explain
from .errors import UserError

# Hydra itself writes nothing and leaves logging alone: only run_dir names where a run writes.
_QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


class _Stopped(BaseException):
    """Carries an exception of a verb out of Hydra, which prints lines of its own about an Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def run(verb: Verb, options: Mapping[str, str], overrides: Sequence[str]) -> int:
    """Compose, check and call; returns the exit status, of a sweep the largest.

    options: Hydra's, with their values ("" for those without).  overrides: key=value words.
    Raises UserError for a mistake in them, and what the verb raises.
    """
    folder = options.get("--config-dir")
    if folder is not None and not os.path.isdir(folder):
        raise UserError("--config-dir", "must name a folder", repr(folder), "Give the folder that holds your files.")
    words = prepared(verb.config, overrides)
    words = words if folder is None else [f"hydra.searchpath=[file://{os.path.abspath(folder)}]", *words]
    if not set(options) - {"--config-dir"}:  # one job: composing once does, hydra.main composes twice
        return _status(call(composed(verb.config, words), function_of(verb)))
    if "--info" not in options:
        return _main(verb, options, words)
    shown = io.StringIO()  # it is printed while Hydra composes: not before that is known to work
    with contextlib.redirect_stdout(shown):
        status = _main(verb, options, words)
    print(shown.getvalue(), end="")
    return status


def _main(verb: Verb, options: Mapping[str, str], words: Sequence[str]) -> int:
    """What needs hydra.main: sweeps, --cfg and --info."""
    statuses = [0]
    sweep = "--multirun" in options

    def explained(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            message = explain(error, verb.config, words)
            if message is None:
                raise
            raise message from None

    def job(cfg: DictConfig, rehearsal: bool = False) -> None:
        try:
            cfg = explained(lambda: resolved(cfg, cast("DictConfig", HydraConfig.get())))
            if rehearsal:
                _rehearse(cfg, function_of(verb))
            else:
                statuses.append(_status(call(cfg, function_of(verb))))
        except Exception as error:
            raise _Stopped(error) from None

    def hydra_main(job: Callable[[DictConfig], None]) -> None:
        with tempfile.TemporaryDirectory() as scratch:  # a sweep writes a file about itself
            flags = [word for option in options.items() for word in option if word]
            _hydra(verb.config, [*flags, *words, *_QUIET, f"hydra.sweep.dir={scratch}"], job)

    try:
        with _one_message(options.get("--package")):
            if sweep:  # no job starts before all are known to be good
                explained(lambda: hydra_main(functools.partial(job, rehearsal=True)))
            explained(lambda: hydra_main(job))
    except _Stopped as stopped:
        raise stopped.error from stopped.error.__cause__
    return max(statuses)


def _status(result: Any) -> int:
    """Of what a verb returns: an exit status, a report that has one, or anything else, which is good."""
    return result if isinstance(result, int) else int(getattr(result, "status", 0))


def _rehearse(cfg: DictConfig, function: Callable[..., Any]) -> None:
    """Check a job of a sweep, and run it dry where the verb can."""
    check(cfg, function)
    if "dry_run" in cfg:
        with contextlib.redirect_stdout(io.StringIO()):
            call(cast("DictConfig", OmegaConf.merge(cfg, {"dry_run": True})), function)


@contextlib.contextmanager
def _one_message(part: str | None) -> Iterator[None]:
    """Hydra prints that the part to show does not exist, and ends with status 1."""
    if part is None:
        yield
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit:
        fix = "Write --package trainer, or a dotted key."
        raise UserError("--package", "must name a part of the configuration", repr(part), fix) from None


def _hydra(config: str, words: Sequence[str], job: Callable[[DictConfig], None]) -> None:
    """hydra.main, which reads sys.argv, and hands its exceptions on only under HYDRA_FULL_ERROR=1."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["diffdistill", *words], "1"
    try:
        hydra.main(config_path=f"pkg://{config_files.PACKAGE}", config_name=config, version_base="1.3")(job)()
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def complete(words: Sequence[str], verbs: Mapping[str, Verb]) -> int:
    """Answer the shell: the verb's words first, then Hydra's completion of that verb's keys and groups."""
    command, _, typed = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    config = "train"
    if any(word.startswith("query=") for word in words):
        name = next((name for name in verbs if typed.startswith(f"{name} ")), None)
        if name is None:
            before = typed.split() if typed.endswith(" ") else typed.split()[:-1]
            names = [name.split() for name in verbs if name.split()[: len(before)] == before]
            print(" ".join(sorted({parts[len(before)] for parts in names})))
            return 0
        config = verbs[name].config
        os.environ["COMP_LINE"] = f"{command} {typed[len(name) :].lstrip()}"
    _hydra(config, words, lambda cfg: None)
    return 0
