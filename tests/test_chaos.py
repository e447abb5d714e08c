"""A few of every fault that `make chaos` makes by the hundred."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import chaos
import chaos_files
import pytest
from chaos_kills import Row

ROW = re.compile(
    r"\| (?P<fault>[^|]+) \| (?P<cases>\d+) \| (?P<good>\d+) \w+ \| (?P<lost>[^|]*) \| (?P<equal>[^|]*) \|"
)


def table(*words: str) -> dict[str, re.Match[str]]:
    """The rows by their fault; what could not be tried here has none."""
    command = [sys.executable, str(Path(chaos.__file__)), "--short", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {found["fault"]: found for line in done.stdout.splitlines() if (found := ROW.fullmatch(line))}


def test_ten_kills_lose_nothing_that_was_committed() -> None:
    row = table("--only", "kill")["SIGKILL at random moments"]
    assert row["cases"] == row["good"] == "10"
    assert row["equal"] == "yes"
    assert int(row["lost"].split(", ")[1]) <= 5  # the interval between checkpoints


def test_every_other_fault_is_borne_or_told() -> None:
    others = [name for name in chaos.parts(short=True) if name not in ("kill", "rank")]
    rows = table(*(word for name in others for word in ("--only", name)))
    assert len(rows) >= len(others) - 1  # a folder cannot be made read-only everywhere
    for row in rows.values():
        assert row["cases"] == row["good"] != "0", row[0]
        assert row["equal"] in ("yes", ""), row[0]
        assert not row["lost"] or int(row["lost"].split(", ")[1]) <= 10, row[0]
    assert rows["SIGTERM at random moments"]["lost"] == "0.0, 0"


def test_a_folder_is_sealed_though_a_file_of_it_is_opened_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opened, original = tmp_path / "saves", list[IO[bytes]](), subprocess.run
    folder.mkdir()

    def run(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        with contextlib.suppress(OSError):
            opened.append((folder / "being written").open("wb"))
        return done

    monkeypatch.setattr(subprocess, "run", run)
    sealed = chaos_files._sealed(folder)
    if sealed:
        with pytest.raises(OSError, match="Read-only"):
            (folder / "later").write_bytes(b"")
        original(["umount", "-l", str(folder)], check=True)
    for file in opened:
        file.close()
    shutil.rmtree(tmp_path)  # busy while anything is mounted there, permitted or not
    if not sealed:
        pytest.skip("mounting a file system is not permitted here")


def test_the_table_tells_what_is_bad_and_what_was_not_run(tmp_path: Path) -> None:
    row = Row("a fault", "survived")
    row.count(True, "first")
    row.count(False, "second")
    row.lost += [1, 4]
    assert not row.well
    assert row.notes == ["BAD: second"]
    assert str(row) == "| a fault | 2 | 1 survived | 2.5, 4 |  |"
    row.good = 2
    assert row.well
    row.went_on(False)
    row.went_on(True)
    assert not row.well
    assert str(row).endswith("| NO |")
    assert not Row("none", "survived").well
    skipped = Row("none", "survived", skipped="no disk")
    assert skipped.well
    assert str(skipped) == "| none | not run: no disk | | | |"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{chaos.BEGIN}{chaos.HEAD}\n| a | old |\n| b | kept |\n\nold\n{chaos.END}after\n")
    chaos.write(page, ["| a | new |", "| c | new |"], "make chaos", 120)
    text = page.read_text()
    table = "| a | new |\n| b | kept |\n| c | new |\n"
    assert text.startswith(f"before\n{chaos.BEGIN}{chaos.HEAD}\n{table}\nMade by `make chaos` in 2 minutes: ")
    assert text.endswith(f"{chaos.END}after\n")
    assert "old" not in text


@pytest.mark.parametrize("name", chaos.parts(short=True))
def test_make_chaos_tries_more(name: str) -> None:
    assert chaos.parts(short=False)[name][1] > chaos.parts(short=True)[name][1]
