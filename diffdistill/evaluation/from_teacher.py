"""How far a student's samples are from its teacher's, against how far two sets of the teacher's are from each other.

For students of a guided teacher, whose target is not the data. `python -m diffdistill.evaluation.from_teacher RUN`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from diffdistill.errors import UserError
from diffdistill.evaluation.frechet import Moments, frechet_distance, moments
from diffdistill.evaluation.harness import draw
from diffdistill.recipe import Recipe
from diffdistill.saved_run import load_run
from diffdistill.solvers import Sampler


@dataclass(frozen=True)
class FromTeacher:
    """Frechet distances of pixels. student: to sets of the teacher's samples, mean.  floor: between pairs of the
    teacher's sets, mean.  gap: student - floor, what training left.
    """

    student: float
    floor: float
    gap: float
    nfe: int
    teacher_nfe: int
    pairs: int
    num_samples: int


def from_teacher(recipe: Recipe, pairs: int = 3, num_samples: int = 10_000, batch_size: int = 500) -> FromTeacher:
    """Compare the recipe's student with its (guided) teacher's sampler, on sets that share no noise.

    pairs: of independent sets of the teacher's, each of num_samples.
    """

    def drawn(sampler: Sampler, seed: int) -> Moments:
        networks = recipe.networks
        samples, _ = draw(sampler, recipe.data, num_samples, seed, batch_size, networks.device, networks.dtype)
        return moments(samples)

    generator, teacher = recipe.distiller.generator, recipe.sampler
    ours = drawn(generator, 0)
    sets = [(drawn(teacher, 2 * pair + 1), drawn(teacher, 2 * pair + 2)) for pair in range(pairs)]
    floor = sum(frechet_distance(a, b) for a, b in sets) / pairs
    student = sum(frechet_distance(ours, a) for a, _ in sets) / pairs
    return FromTeacher(student, floor, student - floor, generator.nfe, teacher.nfe, pairs, num_samples)


def main(argv: Sequence[str]) -> int:
    """Print a run's FromTeacher as JSON; returns the exit status, 2 after a mistake in what was asked for."""
    try:
        if len(argv) != 1:
            fix = "Write python -m diffdistill.evaluation.from_teacher runs/agd."
            raise UserError("from_teacher", "must be given the folder of one run", list(argv), fix)
        recipe, _ = load_run(argv[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(from_teacher(recipe))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
