"""The distance of a student from its teacher's samples, on a Gaussian whose distance is known."""

from __future__ import annotations

import pytest
import torch
from optimum import gauss_recipe, place

from diffdistill.evaluation.from_teacher import from_teacher, main


def test_the_gap_is_the_distance_of_the_laws_and_the_floor_what_finite_sets_add() -> None:
    recipe = gauss_recipe("dmd2")
    place(recipe, 0.0, 1.0)
    exact = from_teacher(recipe, num_samples=4000)
    assert 0 < exact.floor < 0.02 and abs(exact.gap) < 0.01
    place(recipe, 0.5, 1.2)
    shifted = from_teacher(recipe, num_samples=4000)
    std = torch.tensor([1.3, 0.8, 1.0, 0.6, 0.9, 1.1])
    known = 6 * 0.5**2 + float((0.2 * std).square().sum())
    assert shifted.gap == pytest.approx(known, rel=0.05)
    assert shifted.floor == exact.floor and (exact.nfe, exact.teacher_nfe) == (1, 35)


@pytest.mark.parametrize("words", [[], ["nowhere"], ["a", "b"]])
def test_a_mistake_ends_with_status_two_and_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
