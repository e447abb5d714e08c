"""Watchdog, dumps of stacks, log levels and throughput: what a run tells of itself while it trains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from interruption import assert_equal, killed_after

from diffdistill import activity, logs, stacks
from diffdistill.cli import main
from diffdistill.data import Mixture2D
from diffdistill.errors import UserError
from diffdistill.memory import held
from diffdistill.throughput import Meter
from diffdistill.trainer import Trainer
from diffdistill.watchdog import Watchdog

QUICK = [
    "train", "data=gmm2d", "distiller=dmd2", "trainer.steps=6", "trainer.batch_size=16", "trainer.log_every=2",
    "trainer.checkpoint_every=2", "evaluation=none", "probe=null",
]  # fmt: skip


def stalled(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, seconds: float = 1.0) -> None:
    """The call number `at` of owner.name takes that long."""
    original, count = getattr(owner, name), [0]

    def slow(*args: Any, **keys: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            time.sleep(seconds)
        return original(*args, **keys)

    monkeypatch.setattr(owner, name, slow)


def test_a_stalled_loader_is_told_once_with_its_phase_and_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    stalled(monkeypatch, Mixture2D, "batch", 4)
    assert main([*QUICK, f"run_dir={run_dir}", "watchdog.seconds=0.4", "health=null"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ") and "data" in line]
    assert len(told) == 1
    assert re.match(r'warning: rank 0 has stood still for 0?\.\d+ s in "data" after step 3; ', told[0])
    assert "watchdog.seconds=0.4" in told[0]
    written = (run_dir / "stacks-0.txt").read_text()
    assert "in slow" in written
    assert 'in "data" after step 3' in written


@pytest.mark.parametrize(
    ("owner", "name", "activity_told"),
    [(Trainer, "step", '"phase student" after step 0'), ("checkpoint", "commit", '"save" after step 2'),
     ("run", "write_pipeline", '"export" after step 6'), ("harness", "evaluate", '"evaluate" after step 3')],
)  # fmt: skip
def test_the_part_of_the_run_that_hangs_is_named(
    owner: Any, name: str, activity_told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if isinstance(owner, str):
        from diffdistill import checkpoint, run
        from diffdistill.evaluation import harness

        owner = {"checkpoint": checkpoint, "run": run, "harness": harness}[owner]
    stalled(monkeypatch, owner, name, 1)
    words = [*QUICK, "health=null", "watchdog.seconds=0.4"]
    if name == "evaluate":
        words[words.index("evaluation=none")] = "evaluation.every=3"
        words += ["evaluation.teacher=none", "evaluation.metrics=[swd]", "evaluation.num_samples=50"]
    if name == "write_pipeline":
        words[words.index("data=gmm2d")] = "data=digits"
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 0
    assert activity_told in capfd.readouterr().err


def test_the_watchdog_ends_the_process_where_it_is_asked_to(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from diffdistill import activity, stacks
from diffdistill.watchdog import Watchdog
activity.ended(7)
with stacks.into(Path(sys.argv[1])) as dump, Watchdog(0.2, 75).watching(dump), activity.during("data"):
    time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert 'in "data" after step 7' in done.stderr
    assert "ends with status 75" in done.stderr
    assert "time.sleep" not in done.stderr  # stacks are of files and functions
    assert 'File "<string>", line 8 in <module>' in (tmp_path / "stacks-0.txt").read_text()


def test_a_watchdog_that_is_off_starts_no_thread_and_bad_limits_are_refused() -> None:
    before = threading.active_count()
    for seconds in (None, 0.0):
        with Watchdog(seconds).watching(lambda: pytest.fail("nobody looks")):
            assert threading.active_count() == before
    with Watchdog(100).watching(lambda: None):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    for words in ({"seconds": -1.0}, {"seconds": float("nan")}, {"exit_status": 0}, {"exit_status": 256}):
        with pytest.raises(UserError, match=next(iter(words))):
            Watchdog(**words)  # type: ignore[arg-type]


def test_what_moves_is_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    dumped: list[int] = []
    with Watchdog(1.0).watching(lambda: dumped.append(1)):
        for _ in range(40):
            with activity.during("data"):
                time.sleep(0.02)
            with activity.during("phase student"):
                time.sleep(0.02)
    assert dumped == []


def test_the_watchdog_may_change_when_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    with killed_after(monkeypatch, 5):
        main([*QUICK, f"run_dir={run_dir}"])
    for words in (["watchdog=null"], ["watchdog.seconds=5", "watchdog.exit_status=75"]):
        assert main([*QUICK, f"run_dir={run_dir}", "resume=true", *words, "dry_run=true"]) == 0
    assert main(["train", f"run_dir={run_dir}", "resume=true", "watchdog.seconds=9"]) == 0


# --- stacks


def test_sigusr1_writes_stacks_to_stderr_and_into_the_run_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, asked = tmp_path / "whole", tmp_path / "asked"
    assert main([*QUICK, f"run_dir={whole}"]) == 0
    assert not list(whole.glob("stacks-*"))  # nothing was asked
    original, count = Mixture2D.batch, [0]

    def batch(self: Mixture2D, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *args)

    capfd.readouterr()
    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patched:
        patched.setattr(Mixture2D, "batch", batch)
        assert main([*QUICK, f"run_dir={asked}"]) == 0
    assert signal.getsignal(signal.SIGUSR1) == before
    written, shown = (asked / "stacks-0.txt").read_text(), capfd.readouterr().err
    for text in (written, shown):
        assert "in batch" in text
        assert "stacks of rank 0 at 2" in text
        assert 'in "data" after step 2' in text
    assert_equal(whole, asked)


def test_sigusr1_prints_stacks_outside_a_run(tmp_path: Path) -> None:
    code = """
import os, signal
from diffdistill import cli
cli.function_of = lambda verb: verb
from diffdistill import cli_run
def composed(*args): os.kill(os.getpid(), signal.SIGUSR1); raise SystemExit(0)
cli_run.composed = composed
cli.main(["sample", "run=x"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert "in composed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_file_of_stacks_has_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with stacks.into(tmp_path) as dump:
        dump()
    assert "rank 3" in (tmp_path / "stacks-3.txt").read_text()


# --- logging


@pytest.mark.parametrize("words", [["--log-level", "error"], ["--log-level=error"]])
@pytest.mark.parametrize("before", [True, False])
def test_the_log_level_may_stand_before_or_after_the_verb(
    words: list[str], before: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    verb, *rest = [*QUICK, f"run_dir={run_dir}"]
    assert main([*words, verb, *rest] if before else [verb, *words, *rest]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([verb, *rest[:-1], f"run_dir={tmp_path / 'told'}"]) == 0  # the next call has the default again
    assert "look at next:" in capsys.readouterr().out


def test_debug_tells_saves_and_a_warning_stays_at_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*QUICK, f"run_dir={run_dir}", "--log-level", "debug"]) == 0
    shown = capsys.readouterr()
    assert "saved the checkpoint of step 4" in shown.err
    assert all(line.startswith("debug: ") for line in shown.err.splitlines())
    (run_dir / "summary.json").unlink()
    (run_dir / "checkpoints" / "step-00000006" / "state.json").write_text("{")
    assert main(["--log-level", "warning", "train", f"run_dir={run_dir}", "resume=true"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: damaged checkpoint ")
    assert shown.out == ""


@pytest.mark.parametrize("words", [["--log-level"], ["--log-level", "loud"], ["--log-level="], ["--log-level", "INFO"]])
def test_a_bad_log_level_is_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([*words, *(["doctor"] if len(words) > 1 else [])], ["doctor", *words]):
        assert main(line) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: --log-level must be followed by one of debug, info, warning, error, got ")
        assert shown.count("\n") == 1


def test_a_misspelt_option_is_told_with_the_log_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--log-levl", "info"]) == 2
    assert "Did you mean --log-level?" in capsys.readouterr().err


def test_records_have_the_rank_where_there_are_several_and_only_the_first_tells_infos(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    log = logging.getLogger("diffdistill.somewhere")
    for rank, level, infos in (("0", None, True), ("1", None, False), ("1", "info", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        logs.begin(level)
        log.info("on its way")
        log.warning("too slow")
        assert logs.console().quiet == (rank != "0")
        expected = [f"[rank {rank}] info: on its way"] * infos + [f"[rank {rank}] warning: too slow"]
        assert capsys.readouterr().err.splitlines() == expected
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    logs.begin()
    log.warning("alone")
    assert capsys.readouterr().err == "warning: alone\n"


def test_a_lost_process_is_told_by_each_that_is_left_and_other_errors_are_not_dressed_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from diffdistill import cli

    def failing(error: Exception) -> Any:
        def dispatch(words: list[str]) -> int:
            raise error

        return dispatch

    closed = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer."
    monkeypatch.setenv("RANK", "1")
    for error in (RuntimeError(f"{closed}\nThis is typical"), torch.distributed.DistBackendError("NCCL: remote error")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(cli, "_dispatch", failing(error))
        assert main(["train"]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("[rank 1] error: another process of this run has ended, or does not answer: ")
        assert shown.endswith(". What was committed stands: start all of them again with resume=auto\n")
        assert "gloo" not in shown
        assert "typical" not in shown
        assert shown.count("\n") == 1
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(RuntimeError):
            main(["train"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "_dispatch", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["train"])


# --- throughput and memory


def test_rates_are_of_training_since_the_line_before() -> None:
    meter = Meter(samples=32, step=10, seconds=5.0)
    first = meter.figures(14, 7.0)
    assert (first["time/steps_per_second"], first["time/samples_per_second"]) == (2.0, 64.0)
    second = meter.figures(15, 7.25)
    assert (second["time/steps_per_second"], second["time/samples_per_second"]) == (4.0, 128.0)


def test_memory_is_what_the_process_holds() -> None:
    before = held()
    block = bytearray(os.urandom(2**20)) * 64
    after = held()
    assert 0.9 * len(block) < after["rss_bytes"] - before["rss_bytes"] < 2 * len(block)
    assert after["peak_rss_bytes"] >= after["rss_bytes"] * 0.99


def test_logged_lines_hold_rates_and_memory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*QUICK, "trainer.accumulate=2", "trainer.batch_size=8"]
    assert main([*words, f"run_dir={run_dir}"]) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["time/samples_per_second"] == pytest.approx(16 * line["time/steps_per_second"])
        assert line["memory/peak_rss_bytes"] >= line["memory/rss_bytes"] * 0.99 > 2**20
    state = json.loads((run_dir / "checkpoints" / "step-00000006" / "state.json").read_text())
    seconds = sum(2 / line["time/steps_per_second"] for line in lines)
    assert seconds == pytest.approx(state["seconds"])
