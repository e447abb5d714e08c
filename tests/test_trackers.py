"""Trackers: a service gets what the folder holds, is never waited for, and never ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffdistill import trackers
from diffdistill.cli import main
from diffdistill.errors import UserError
from diffdistill.run_folder import RunFolder

WORDS = [
    "train", "data=gmm2d", "trainer.steps=8", "trainer.batch_size=16", "trainer.log_every=2", "evaluation.every=4",
    "evaluation.metrics=[swd]", "evaluation.num_samples=64", "evaluation.interim_samples=64", "probe=null",
    "evaluation.teacher=none",
]  # fmt: skip
KEYS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_a_tracker_nothing_of_a_service_is_imported_or_written(tmp_path: Path) -> None:
    code = "import sys; from diffdistill.cli import main; sys.exit(main(sys.argv[1:]) or 'wandb' in sys.modules)"
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", code, *WORDS, "trainer.steps=1", f"run_dir={run}"], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not (run / "wandb").exists() and not (run / trackers.IDS).exists()


def test_without_a_key_a_run_of_wandb_is_kept_on_disk_and_nothing_is_asked(tmp_path: Path) -> None:
    """In a process of its own, whose input is closed: a prompt would end it."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "diffdistill", *WORDS, "tracker=wandb", "tracker.tags=[a,b]", f"run_dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "wandb:" not in done.stdout + done.stderr
    known = json.loads((run / trackers.IDS).read_text())["wandb"]
    (kept,) = (run / "wandb").glob(f"offline-run-*-{known}")
    assert list(kept.glob("files/media/images/samples_8_*.png"))
    (file,) = kept.glob("*.wandb")  # its reader is not part of the package any more: numbers stand in it as text
    stored = file.read_bytes()
    told = ("critic/", "grad_norm/", "evaluation/")
    numbers = [value for line in lines(run) for key, value in line.items() if key.startswith(told)]
    assert numbers and all(json.dumps(value).encode() in stored for value in numbers)


def test_a_resumed_run_stays_one_run_of_the_service(tmp_path: Path) -> None:
    first, again = (trackers._known(tmp_path, "wandb") for _ in range(2))
    assert first == again != trackers._known(tmp_path, "trackio")
    assert set(json.loads((tmp_path / trackers.IDS).read_text())) == {"wandb", "trackio"}


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_a_key_is_what_makes_a_run_online(monkeypatch: pytest.MonkeyPatch, environment: Any, mode: str) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert trackers.Wandb()._mode() == mode and trackers.Wandb(mode="online")._mode() == "online"


def test_the_key_that_wandb_login_leaves_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai\n  login user\n  password " + "k" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(file))
    assert trackers._wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not trackers._wandb_key()


def test_a_service_that_is_away_leaves_the_run_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "SECONDS", 3)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    assert main([*WORDS, "tracker=wandb", f"run_dir={tmp_path / 'run'}"]) == 0
    told = capsys.readouterr().out
    assert "W&B cannot be reached" in told and "kept offline" in told
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert (tmp_path / "run" / "summary.json").is_file()
    assert "k" * 40 not in told and not any(
        b"k" * 40 in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    )


class Broken:
    """A service that takes the settings and a first line, then breaks."""

    calls = 0

    def store_init_configuration(self, values: Any) -> None: ...

    def log(self, values: Any, step: int) -> None:
        Broken.calls += 1
        if Broken.calls > 1:
            raise ConnectionError("the service went away\nand more")

    def finish(self) -> None:
        raise AssertionError("it was given up before")


def test_a_service_that_breaks_is_told_once_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(self: Any, folder: Path, name: str, config: Any, step: int, tell: Any) -> Any:
        assert name == "run" and config["trainer"]["steps"] == 8 and step == 0
        return trackers._Guarded("broken", Broken, config, lambda *given: None, tell)

    monkeypatch.setattr(trackers.Wandb, "open", opened)
    assert main([*WORDS, "tracker=wandb", f"run_dir={tmp_path / 'run'}"]) == 0
    told = capsys.readouterr().out
    assert told.count("tracker broken is off from here on (the service went away)") == 1 and Broken.calls == 2
    assert RunFolder(tmp_path / "run").is_finished


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_package_that_is_missing_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    assert main([*WORDS, f"tracker={name}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert f"tracker needs the package {name}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_an_interval_is_two_figures_and_what_was_not_measured_is_none() -> None:
    values = {"fd": 1.5, "fd_ci": [0.5, 2.0], "swd": None, "failed": "why"}
    assert dict(trackers._flat(values)) == {"fd": 1.5, "fd_ci/low": 0.5, "fd_ci/high": 2.0, "failed": "why"}


def test_a_damaged_file_of_ids_costs_the_tracker_alone(tmp_path: Path) -> None:
    (tmp_path / trackers.IDS).write_text("{")
    told: list[str] = []
    log = trackers.Wandb(mode="offline").open(tmp_path, "run", {}, 0, told.append)
    log.figures(1, {"loss": 1.0})
    log.close()
    assert len(told) == 1 and told[0].startswith("tracker wandb is off from here on")


def test_online_without_a_key_is_refused() -> None:
    with pytest.raises(UserError, match=r"tracker\.mode online needs a key"):
        trackers.Wandb(mode="online").check()


def test_tensorboard_gets_every_number_of_the_folder_and_drops_steps_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    words = [*WORDS, "tracker=tensorboard", "trainer.checkpoint_every=4", f"run_dir={run}"]
    assert main(words) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("grad_norm/fake_score")}
    wanted = {line["step"]: line["grad_norm/fake_score"] for line in lines(run) if "grad_norm/fake_score" in line}
    assert found == pytest.approx(wanted)
    assert [event.step for event in events.Images("samples")] == [4, 8]
    log = trackers.TensorBoard().open(run, "run", {}, 4, print)
    log.figures(6, {"grad_norm/fake_score": -1.0})
    log.close()
    events.Reload()
    assert [event.step for event in events.Scalars("grad_norm/fake_score")] == [2, 4, 6]


def test_trackio_keeps_the_run_in_its_own_data_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    command = [sys.executable, "-m", "diffdistill", *WORDS, "tracker=trackio", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ)
    assert done.returncode == 0 and "is off from here on" not in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "trackio").glob("*.db"))
