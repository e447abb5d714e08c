"""The command line: `diffdistill VERB [key=value ...]`.

Exit status 0: done; 1: a measured floor was missed, or a run is not well; 2: a mistake in what was asked for, told in
one message; 3: the machine was too noisy to tell. Hydra composes the configuration; its exceptions, like ours, end as
one line on stderr.
Importing this file must stay cheap: `--help` and the shell's completion wait for it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Verb:
    """A verb: the function behind it as `module:name`, the root file in configs/, one line, examples."""

    function: str
    config: str
    summary: str
    examples: tuple[str, ...]


VERBS = {
    "train": Verb(
        "diffdistill.launch:train",
        "train",
        "distil a teacher into a one- or few-step generator (or train a teacher)",
        (
            "train experiment=digits_dmd2 run_dir=runs/x",
            "train data=gmm2d distiller=dmd2 trainer.steps=500",
            "train run_dir=runs/x resume=true",
        ),
    ),
    "distill": Verb(
        "diffdistill.distill:distill",
        "distill",
        "distil a diffusers pipeline on prompts alone, by the recipe of a method's paper",
        ("distill FOLDER_OR_HUB_ID method=dmd2 prompts=prompts.txt", "distill DIR method=vsd prompts=p.txt steps=1"),
    ),
    "sample": Verb(
        "diffdistill.verbs:sample",
        "sample",
        "draw a grid of samples from a run or a pipeline folder",
        ("sample run=runs/x num=64 out=grid.png", "sample pipeline=runs/x/pipeline data=digits seed=1"),
    ),
    "evaluate": Verb(
        "diffdistill.measurement:evaluate",
        "evaluate",
        "measure samples of a run, a pipeline or a folder against a data set, a folder or saved statistics",
        (
            "evaluate run=runs/x out=eval.json",
            "evaluate pipeline=DIR data=digits 'metrics=[all]'",
            "evaluate samples=DIR reference=DIR features=inception",
        ),
    ),
    "export": Verb(
        "diffdistill.verbs:export",
        "export",
        "write a run's generator as a diffusers pipeline folder, verified",
        ("export run=runs/x out=my_pipeline",),
    ),
    "precompute": Verb(
        "diffdistill.precompute:precompute",
        "precompute",
        "encode captioned images into the latents and embeddings that data=latents reads",
        ("precompute path=photos networks=sd15 networks.path=FOLDER_OR_HUB_ID out=latents",),
    ),
    "compare": Verb(
        "diffdistill.compare:compare",
        "compare",
        "train several methods under one budget, into one table with pictures",
        (
            "compare data=gmm2d budget.iterations=400",
            "compare data=digits 'distillers=[dmd2,sid]' budget.seconds=120 out=runs/two",
        ),
    ),
    "plan": Verb(
        "diffdistill.planner:plan",
        "plan",
        "say what a recipe takes in memory, operations and time, and what makes it fit a device",
        ("plan networks=sdxl distiller=dmd2 device_memory=24GiB", "plan experiment=digits_dmd2 device_rate=measure"),
    ),
    "doctor": Verb(
        "diffdistill.doctor:doctor",
        "doctor",
        "report on the environment, on a run's health, or on whether a teacher is read as it was trained",
        ("doctor", "doctor run=runs/x", "doctor networks=sd15 networks.path=DIR data=latents data.path=DIR"),
    ),
    "report": Verb(
        "diffdistill.report:report",
        "report",
        "write one HTML file about a run or a comparison: figures, samples, curves, verdicts",
        ("report run=runs/x", "report run=runs/x out=x.html"),
    ),
    "demo": Verb(
        "diffdistill.demo:demo",
        "demo",
        "serve a page on this machine: teacher and student side by side, from the same seed",
        (
            "demo pipeline=runs/x/pipeline teacher=asset:digits",
            "demo pipeline=runs/mine/pipeline teacher=FOLDER_OR_HUB_ID",
        ),
    ),
    "bench step": Verb(
        "diffdistill.bench:step",
        "bench_step",
        "time training steps beside their network passes, updates and arithmetic alone",
        (
            "bench step 'distillers=[dmd2]' quick=true",
            "bench step distillers=all 'networks=[digits,transformer_50m]' out=bench.json plot=bench.png",
        ),
    ),
    "bench pipeline": Verb(
        "diffdistill.bench_pipeline:pipeline",
        "bench_pipeline",
        "time whole calls of a pipeline beside the network calls inside them",
        (
            "bench pipeline pipeline=runs/x/pipeline quick=true",
            "bench pipeline pipeline=runs/x/pipeline 'batch_sizes=[1,32]' compile=true out=bench.json",
        ),
    ),
    "bench attention": Verb(
        "diffdistill.kernels.attention.bench:attention",
        "bench_attention",
        "time block-sparse attention against the machine's ceiling and torch",
        ("bench attention quick=true", "bench attention out=bench.json plot=bench.png"),
    ),
}

# Hydra's options that make sense here: None if no value follows, else the values to choose from, () for any.
_PARTS = ("job", "hydra", "all")
_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_OPTIONS: dict[str, tuple[str, ...] | None] = {
    "--multirun": None,
    "--cfg": _PARTS,
    "--resolve": None,
    "--package": (),
    "--info": _TOPICS,
    "--config-dir": (),
}
_SHORT = {"-m": "--multirun", "-c": "--cfg", "-p": "--package", "-i": "--info", "-cd": "--config-dir"}
_DECIDING = ("--multirun", "--cfg", "--info")  # what is done: one of them
_WITH_CFG = ("--resolve", "--package")


def entry() -> None:
    """The console script. What ends it as a defect is printed without secrets."""
    try:
        status = main(sys.argv[1:])
    except Exception:
        import traceback

        from .redaction import redacted

        print(redacted(traceback.format_exc()), file=sys.stderr, end="")
        status = 1
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit status."""
    from . import logs, stacks
    from .errors import Stopped

    try:
        words, level = _log_level(argv)
        logs.begin(level)
        stacks.to_stderr()
        return _dispatch(words)
    except Stopped as stopped:
        return stopped.status
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except ValueError as error:
        if not _caused_by_user(error):
            raise
        _say("error: " + " ".join(str(error).split()))  # one line, whatever was quoted in it
        return 2
    except RuntimeError as error:
        if not logs.lost_process(error):
            raise
        return logs.tell_lost(error)


def _say(text: str) -> None:
    """Print to stderr, without secrets, once when several processes run the same command."""
    from .redaction import redacted

    if os.environ.get("RANK", "0") == "0":
        print(redacted(text), file=sys.stderr)


def _caused_by_user(error: ValueError) -> bool:
    """Our own constructors raise ValueError for what a user can cause; one from inside another library is a defect."""
    from .errors import UserError

    if isinstance(error, UserError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(__file__).parent in Path(trace.tb_frame.f_code.co_filename).parents


def _log_level(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without --log-level, which may stand before or after the verb, and its value."""
    from .logs import LEVELS, OPTION

    others: list[str] = []
    level = None
    remaining = iter(argv)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == OPTION:
            level = value if equals else next(remaining, "")
            _check_option(OPTION, level, LEVELS)
        else:
            others.append(word)
    return others, level


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["--version"] or argv[:1] in ([], ["--help"], ["-h"], ["help"]):
        from . import cli_help

        print(cli_help.version() if argv[:1] == ["--version"] else cli_help.overview(VERBS))
        return 0
    if argv[0] in ("--shell-completion", "-sc"):
        from .cli_run import complete

        return complete(argv, VERBS)
    name, rest = _verb(argv)
    if "--help" in rest or "-h" in rest:
        from . import cli_help

        below = {key: verb for key, verb in VERBS.items() if key.startswith(f"{name} ")}
        print(cli_help.overview(below) if below else cli_help.verb_help(name, VERBS[name]))
        return 0
    from .cli_run import run

    if name == "distill":  # keys of train may stand beside its own, and beside plan's
        from .distill import arguments

        rest = arguments(rest)
    elif name == "plan":
        from . import planner

        rest = planner.arguments(rest)
    elif name == "doctor":
        from .doctor import arguments as train_in_overrides

        rest = train_in_overrides(rest)
    elif name == "bench step":
        from .bench import arguments as networks_as_teachers

        rest = networks_as_teachers(rest)
    return run(VERBS[name], *_options_and_overrides(rest))


def _verb(argv: list[str]) -> tuple[str, list[str]]:
    """Split the verb, of one or two words, from what follows it."""
    first, rest = argv[0], argv[1:]
    seconds = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    if first in VERBS or (seconds and rest[:1] in (["--help"], ["-h"])):
        return first, rest
    if seconds and rest and rest[0] in seconds:
        return f"{first} {rest[0]}", rest[1:]
    if seconds:
        given = repr(rest[0]) if rest else "nothing"
        fix = f"Write {first} {seconds[0]}."
        raise _mistake(first, f"must be followed by one of {', '.join(seconds)}", given, fix)
    verbs = sorted({name.split()[0] for name in VERBS})
    raise _mistake("the verb", f"must be one of {', '.join(verbs)}", repr(first), verbs)


def _options_and_overrides(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split Hydra's options, with their values, from the overrides: they may stand in any order."""
    options: dict[str, str] = {}
    overrides: list[str] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if not word.startswith("-"):
            overrides.append(word)
        elif name not in _OPTIONS:
            raise _mistake("the option", "must be one that exists", repr(word), [*_OPTIONS, "--log-level"])
        elif _OPTIONS[name] is None:
            if equals:
                raise _mistake(name, "must stand alone", repr(value), f"Write {name}.")
            options[name] = ""
        else:
            options[name] = value if equals else next(remaining, "")
            _check_option(name, options[name], _OPTIONS[name] or ())
    _check_together(options)
    return options, overrides


def _check_together(options: Mapping[str, str]) -> None:
    """Refuse two options that decide what is done, and those of --cfg without it."""
    deciding = [name for name in _DECIDING if name in options]
    if len(deciding) > 1:
        raise _mistake(deciding[0], f"must not go with {deciding[1]}", "both", "Leave one out.")
    for name in _WITH_CFG:
        if name in options and "--cfg" not in options:
            raise _mistake(name, "must go with --cfg", "it alone", "Add --cfg job.")


def _check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not value or (choices and value not in choices):
        one = f"one of {', '.join(choices)}" if choices else "a value"
        fix = f"Write {name} {choices[0] if choices else 'VALUE'}."
        raise _mistake(name, f"must be followed by {one}", repr(value) if value else "nothing", fix)


def _mistake(key: str, constraint: str, value: str, fix: str | list[str]) -> ValueError:
    """A UserError; `fix` may be the known words."""
    from .config_types import did_you_mean  # costs a third of a second
    from .errors import UserError

    return UserError(key, constraint, value, fix if isinstance(fix, str) else did_you_mean(value.strip("'"), fix))


def function_of(verb: Verb) -> Callable[..., Any]:
    """The function behind a verb; importing it brings in torch."""
    module, _, name = verb.function.partition(":")
    return getattr(importlib.import_module(module), name)
