"""The committed leaderboard, from the folder of a comparison: docs/leaderboard.csv, .md, .png and the samples.

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

COPIED = {
    "table.csv": "leaderboard.csv",
    "distance_against_cost.png": "leaderboard.png",
    "samples.png": "leaderboard_samples.png",
}


def write(comparison: str, docs: str) -> None:
    """Copy table and pictures of a finished comparison into `docs`, and write leaderboard.md around its table.

    Raises UserError if the folder holds no comparison.
    """
    source, target = Path(comparison), Path(docs)
    plan = read_json(source / "compare.json", "comparison")
    read_json(source / "table.json", "comparison")  # written last: no copy of half a table
    target.mkdir(parents=True, exist_ok=True)
    for name, copy in COPIED.items():
        shutil.copyfile(source / name, target / copy)
    (target / "leaderboard.md").write_text(page(plan, (source / "table.md").read_text()))


def page(plan: Mapping[str, Any], table: str) -> str:
    """A Markdown page: the command, the machines it ran on, the table, the pictures. plan: of compare.json."""
    return "\n".join(
        [
            f"# Leaderboard: {plan['data']}",
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
            f"![distance against cost]({COPIED['distance_against_cost.png']})",
            "",
            f"![samples from the same noise]({COPIED['samples.png']})",
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
