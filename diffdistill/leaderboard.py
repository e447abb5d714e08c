"""A committed page from the folder of a comparison, by its name: docs/leaderboard.csv, .md, .png and the samples.

`python -m diffdistill.leaderboard runs/leaderboard docs`
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffdistill.config import override
from diffdistill.run_folder import read_json

COPIED = {"table.csv": ".csv", "distance_against_cost.png": ".png", "samples.png": "_samples.png"}


def write(comparison: str, docs: str) -> None:
    """Copy table and pictures of a finished comparison into `docs` and write a page around its table, under the name
    of its folder.

    Raises UserError if the folder holds no comparison.
    """
    source, target = Path(comparison).resolve(), Path(docs)
    plan = read_json(source / "compare.json", "comparison")
    read_json(source / "table.json", "comparison")  # written last: no copy of half a table
    target.mkdir(parents=True, exist_ok=True)
    for file, end in COPIED.items():
        shutil.copyfile(source / file, target / f"{source.name}{end}")
    (target / f"{source.name}.md").write_text(page(source.name, plan, (source / "table.md").read_text()))


def page(name: str, plan: Mapping[str, Any], table: str) -> str:
    """A Markdown page: the command, the machines it ran on, the table, the pictures. plan: of compare.json."""
    return "\n".join(
        [
            f"# {name.replace('_', ' ').capitalize()}: {plan['data']}",
            "",
            "```bash",
            command(plan),
            "```",
            "",
            "`iterations` are updates of the student; `cpu_seconds` those of its training process, pairs included. A"
            " budget of seconds becomes a number of steps before a method begins, by the price of a few; where steps"
            " are dearer in the end, training stops at the limit.",
            "",
            *(f"Machine: {text}." for text in machines(plan)),
            "",
            table.strip(),
            "",
            f"![distance against cost]({name}{COPIED['distance_against_cost.png']})",
            "",
            f"![samples from the same noise]({name}{COPIED['samples.png']})",
            "",
        ]
    )


def command(plan: Mapping[str, Any]) -> str:
    """The command line of a comparison, as a shell takes it."""
    budget = [f"budget.{name}={value}" for name, value in plan["budget"].items() if value is not None]
    values = re.split(r" (?=data\.)", f"data={plan['data']}")
    more = [override("overrides", plan["overrides"])] if plan["overrides"] else []
    words = [*values, f"distillers=[{','.join(plan['methods'])}]", *budget, f"seed={plan['seed']}", *more]
    return " ".join(["diffdistill compare", *map(shlex.quote, words)])


def machines(plan: Mapping[str, Any]) -> list[str]:
    """The different machines that methods were trained on, in words."""
    found = [
        "{processor}, {cores} cores, {machine}; torch {torch}, threads: {threads}".format(**method["machine"])
        for method in plan["methods"].values()
        if "machine" in method
    ]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2])
