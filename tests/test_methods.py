"""The README's table of methods is the generated one."""

from pathlib import Path

import pytest

from diffdistill import methods
from diffdistill.methods import filled, table

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_holds_the_table_of_today() -> None:
    assert filled(README.read_text()) == README.read_text()


def test_every_distiller_config_has_a_row_with_its_paper() -> None:
    rows = table().splitlines()[2:]
    names = sorted(path.stem for path in (README.parent / "configs" / "distiller").glob("*.yaml"))
    assert [row.split("`")[1] for row in rows] == names
    assert all("https://arxiv.org/abs/" in row for row in rows)


def test_our_figures_come_from_the_committed_comparisons_and_else_say_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "DOCS", tmp_path)
    assert all(row.endswith("| not run |") for row in table().splitlines()[2:])
    (tmp_path / "leaderboard.csv").write_text(
        "method,fd_pixel,nfe,error\nsid,0.1234,1,\nsid_few_step,0.2,4,\ndmd,,,diverged\nteacher,0.04,35,\n"
    )
    (tmp_path / "regression.csv").write_text("method,fd_pixel,nfe\nkd,0.0567,1\nteacher,0.04,35\n")
    ends = {row.split("`")[1]: row.split("|")[-2].strip() for row in table().splitlines()[2:]}
    assert (ends["sid"], ends["sid_few_step"], ends["dmd"]) == ("0.123", "0.200 (4 evaluations)", "not run")
    assert ends["kd"] == "0.057"
