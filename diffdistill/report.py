"""`diffdistill report`: one HTML file about a run or a comparison, with all its pictures inside and no script.

It is made of what lies in the folder: config.yaml, metrics.jsonl, summary.json, starts.json and the samples that were
kept. Everything in it is escaped, and its policy lets a browser load nothing from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from diffdistill import checkpoint, report_compare, report_run
from diffdistill.run_folder import RunFolder, new_file, say, writing
from diffdistill.saved_run import load_run
from diffdistill.small_samples import SameNoise, kept_same_noise, same_noise

FILE = "report.html"


def report(run: str, out: str | None) -> str:
    """Write the report of a run, finished, stopped, failed or going on, or of a comparison; returns its path.

    out: the file; None is report.html in the folder. Of a run that kept no samples of teacher and student side by side
    they are drawn from its newest checkpoint, if it has one.
    Raises UserError if the folder is neither.
    """
    folder = RunFolder(Path(run))
    target = Path(run) / FILE if out is None else new_file("out", out)
    fix = "Name another file by out=FILE, or make room."
    if (folder.path / "compare.json").is_file():
        with writing(target, "out", fix):
            write_compare_report(folder.path, target)
    else:
        folder.read_config("run")  # refused here, not after work
        drawn = _drawn(folder)
        with writing(target, "out", fix):
            write_run_report(folder, drawn, target)
    Console().print(f"wrote {target}", soft_wrap=True, highlight=False)
    return str(target)


def write_run_report(folder: RunFolder, drawn: SameNoise | None = None, target: Path | None = None) -> None:
    """Write a run's report. drawn: teacher and student; None takes those that the run kept."""
    write(target or folder.path / FILE, "run.html", report_run.page(folder, drawn or kept_same_noise(folder.path)))


def write_compare_report(folder: Path, target: Path | None = None) -> None:
    """Write the report of the comparison in `folder`."""
    write(target or folder / FILE, "compare.html", report_compare.page(folder))


@contextmanager
def or_tell(run: Path) -> Iterator[None]:
    """Within, an error is told and not raised: what a report is about stands without it. run: folder of that."""
    try:
        yield
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        say(f"no {FILE} was written, nothing else is missing: {what}. diffdistill report run={run} tries again.")


def write(target: Path, template: str, content: Any) -> None:
    """Render a template of this package, its variables escaped, into a file that is whole or not there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("diffdistill"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = pages.get_template(template).render(page=content)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(target)


def _drawn(folder: RunFolder) -> SameNoise | None:
    """Teacher and student of the newest checkpoint; None where the run kept them, or there is nothing to draw from.

    What cannot be drawn is told: the rest of a report needs no network.
    """
    kept, steps = kept_same_noise(folder.path), checkpoint.steps(folder.checkpoints)
    newest = max((int(path.name.removeprefix("step-")) for path in steps), default=None)
    if newest is None or (kept is not None and kept.step >= newest):
        return None
    try:
        recipe, _ = load_run(str(folder.path), newest)
        return same_noise(newest, recipe)
    except (RuntimeError, ValueError) as error:
        say(f"teacher and student are not drawn: {str(error).splitlines()[0]}")
        return None
