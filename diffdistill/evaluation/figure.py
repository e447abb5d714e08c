"""The README's figure: teacher and student of a run from the same noise, side by side.

`python -m diffdistill.evaluation.figure RUN OUT.png`
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffdistill.evaluation import harness
from diffdistill.evaluation.plots import side_by_side
from diffdistill.pictures import columns_of, shown_classes
from diffdistill.saved_run import load_run


def draw(run: str, out: str, rows: int = 8) -> None:
    """Write a picture with the teacher's samples on the left and the student's on the right, a column per class."""
    recipe, _ = load_run(run)
    columns = columns_of(recipe.data)
    labels = shown_classes(recipe.data, rows * columns)
    grids = [
        harness.draw(sampler, recipe.data, rows * columns, 0, 500, labels=labels)[0]
        for sampler in (recipe.sampler, recipe.distiller.generator)
    ]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    titles = [f"teacher: {recipe.sampler.nfe} evaluations", f"student: {recipe.distiller.generator.nfe} evaluation"]
    side_by_side(grids, titles, out, columns)


if __name__ == "__main__":
    draw(sys.argv[1], sys.argv[2])
