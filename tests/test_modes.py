"""Eight modes in the plane from unconditional noise: which methods find them all in a short run, and which do not."""

from __future__ import annotations

from pathlib import Path

import pytest

import diffdistill

UPDATES = 1500
# From a sigma where the teacher's one-step output already points outwards, at rates that suit a short run.
WORDS = (
    "data.unconditional=true", "distiller.times=[2.0]", "evaluation.metrics=[modes]", "evaluation.teacher=none",
    "evaluation.num_samples=10000",
)  # fmt: skip
RATES = ("trainer.optimizer.student.lr=1e-3", "trainer.optimizer.default.lr=2e-3")
DMD2 = ("trainer.optimizer.default.lr=1e-3",)
FIND_ALL = ("dmd", "dmd2", "diff_instruct", "sid", "sida", "sim")
# The others, and how many modes they held after the same run where that was measured first
MODE_SEEKING = {"f_distill": 7, "uni_instruct": 7, "sid_lsg": 7, "sid_few_step": 2, "vsd": 1}


def modes(name: str, folder: Path) -> int:
    steps, rates = (5000, DMD2) if name == "dmd2" else (UPDATES, RATES)  # at 7,500 steps dmd2 holds fewer
    words = [word for word in WORDS if name != "sid_few_step" or "times" not in word]
    summary = diffdistill.train(
        f"experiment=gmm2d_{name}", *words, *rates, f"trainer.steps={steps}", run_dir=str(folder / name)
    )
    return summary["student"]["modes"]


def test_every_method_of_the_leaderboard_is_on_one_side() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    methods = next(line for line in makefile.splitlines() if line.startswith("METHODS ?=")).split("= ")[1].split(",")
    assert sorted(methods) == sorted([*FIND_ALL, *MODE_SEEKING])


@pytest.mark.slow
@pytest.mark.parametrize("name", FIND_ALL)
def test_all_eight_modes_are_found(name: str, tmp_path: Path) -> None:
    assert modes(name, tmp_path) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", MODE_SEEKING)
def test_the_others_lose_some(name: str, tmp_path: Path) -> None:
    """At most one mode from what was measured first: machines round differently."""
    held = modes(name, tmp_path)
    assert held < 8 and abs(held - MODE_SEEKING[name]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FIND_ALL, *MODE_SEEKING])
def test_with_the_mode_as_condition_all_eight_are_held(name: str, tmp_path: Path) -> None:
    words = ("evaluation.metrics=[modes]", "evaluation.teacher=none", "evaluation.num_samples=10000")
    steps = 2000 if name == "dmd2" else 400
    summary = diffdistill.train(
        f"experiment=gmm2d_{name}", *words, f"trainer.steps={steps}", run_dir=str(tmp_path / "r")
    )
    assert summary["student"]["modes"] == 8
