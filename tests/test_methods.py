"""The README's table of methods is the generated one."""

from pathlib import Path

from diffdistill.methods import filled, table

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_holds_the_table_of_today() -> None:
    assert filled(README.read_text()) == README.read_text()


def test_every_distiller_config_has_a_row_with_its_paper() -> None:
    rows = table().splitlines()[2:]
    names = sorted(path.stem for path in (README.parent / "configs" / "distiller").glob("*.yaml"))
    assert [row.split("`")[1] for row in rows] == names
    assert all("https://arxiv.org/abs/" in row for row in rows)
