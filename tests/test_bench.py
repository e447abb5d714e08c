"""The bench's list of passes is the training step's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffdistill import bench
from diffdistill.errors import UserError


def test_passes_of_dmd2_are_listed_with_their_direction_and_sum_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    status = bench.step(["dmd2"], ["gmm2d"], pairs=3, quick=True, out=str(out))
    assert status in (0, bench.NOISY)
    (result,) = json.loads(out.read_text())["results"]
    names = [part["name"] for part in result["parts"]]
    assert "student: student forward + backward, batch 8" in names
    assert "student: target forward, batch 8" in names
    assert "critic: fake_score forward + backward, batch 8" in names
    counts = {part["name"]: part["count"] for part in result["parts"]}
    assert counts["critic: fake_score forward + backward, batch 8"] == result["steps_in_cycle"] == 5
    assert counts["critic: student forward, batch 8"] == 4  # the fifth step's samples are the student phase's
    total = sum(part["milliseconds"] for part in result["parts"])
    assert result["sum_milliseconds"] == pytest.approx(total)
    assert result["ratio"] == pytest.approx(result["step_milliseconds"] / total)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("verdict:")


def test_a_period_is_found() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    assert bench.period(lambda step: [Named("a")] if step % 3 else [Named("b")]) == 3  # type: ignore[list-item,return-value]


def test_an_output_folder_that_does_not_exist_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out must name a file"):
        bench.step(["dmd2"], ["gmm2d"], pairs=3, quick=True, out=str(tmp_path / "no" / "x.json"))
