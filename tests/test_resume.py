"""Interrupted runs: bit-equal when they go on, and refused or passed over where that cannot be promised."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interruption import KilledError, assert_equal, killed_after

from diffdistill import checkpoint
from diffdistill.cli import main
from diffdistill.config import build
from diffdistill.recipe import assemble
from diffdistill.run import Run
from diffdistill.run_folder import RunFolder
from diffdistill.trainer import Trainer

BASE = ["train", "data=gmm2d", "trainer.steps=12", "trainer.batch_size=16", "trainer.log_every=1", "trainer.keep=20"]
INTERIM = [
    "evaluation.teacher=none", "evaluation.metrics=[swd]", "evaluation.num_samples=50", "evaluation.interim_samples=40",
]  # fmt: skip

# The three kinds of state there are: two clocks with a GAN, a curriculum with two averages, several methods at once.
COMPOSITE = """
defaults: [/distiller/dmd2@parts.dmd2, /distiller/consistency@parts.consistency, _self_]
_target_: diffdistill.distillers.base.Composite
_partial_: true
parts: {consistency: {distance: {c: 0.1}}, dmd2: {student_every: 2}}
weights: {dmd2: 1.0, consistency: 0.5}
"""
CASES = {
    "dmd2 with a GAN, 5 to 1": ["distiller=dmd2", "distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1"],
    "consistency with a curriculum": [
        "distiller=consistency", "distiller/pairs=doubling", "distiller.pairs.num_steps.last=40",
    ],
    "composite": ["distiller=both", "--config-dir"],
    "lora": ["distiller=dmd2", "roles.student=lora", "roles.fake_score=lora", "lora.rank=2"],
}  # fmt: skip


def words_of(case: str, tmp_path: Path) -> list[str]:
    words = list(CASES[case])
    if words[-1] == "--config-dir":
        (tmp_path / "configs" / "distiller").mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / "distiller" / "both.yaml").write_text(COMPOSITE)
        words.append(str(tmp_path / "configs"))
    return [*BASE, *INTERIM, *words]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*words_of(case, tmp_path), "evaluation.every=4", "trainer.checkpoint_every=3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*words, f"run_dir={whole}"]) == 0
    for updates in (3, 7):  # dies, goes on, dies again later
        with killed_after(monkeypatch, updates):
            main([*words, f"run_dir={broken}", "resume=auto"])
    assert main([*words, f"run_dir={broken}", "resume=true"]) == 0
    assert_equal(whole, broken)


def test_cpu_seconds_go_on_and_begin_at_zero_where_a_checkpoint_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    words = [*words_of("dmd2 with a GAN, 5 to 1", tmp_path), "evaluation=none", "trainer.checkpoint_every=3"]
    with killed_after(monkeypatch, 9):
        main([*words, f"run_dir={run_dir}"])
    found, settings = RunFolder(run_dir).newest(), RunFolder(run_dir).read_config()
    assert found is not None
    assert found.values["cpu_seconds"] > 0
    recipe, trainer = assemble(settings), build(settings.trainer)
    state = trainer.start(recipe.distiller, recipe.networks)
    state.load(replace(found, values={**found.values, "cpu_seconds": 5.0}))
    assert state.values()["cpu_seconds"] == 5.0
    state.load(replace(found, values={k: v for k, v in found.values.items() if k != "cpu_seconds"}))
    assert state.values()["cpu_seconds"] == 0.0
    monkeypatch.setattr("time.process_time", iter(range(100)).__next__)  # a second for every second look
    assert main(["train", f"run_dir={run_dir}", "resume=true"]) == 0
    left = 12 - found.step
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["cpu_seconds"] == pytest.approx(found.values["cpu_seconds"] + left, abs=0.01)


def test_what_is_left_to_a_kill_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a state that is off: the same run resumed with a forgotten optimizer differs."""
    from diffdistill.training_state import TrainingState

    words = [*words_of("dmd2 with a GAN, 5 to 1", tmp_path), "evaluation=none", "trainer.checkpoint_every=3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*words, f"run_dir={whole}"]) == 0
    with killed_after(monkeypatch, 9):
        main([*words, f"run_dir={broken}"])
    monkeypatch.setattr(TrainingState, "_load_optimizer", lambda self, role, checkpoint: None)
    assert main([*words, f"run_dir={broken}", "resume=true"]) == 0
    with pytest.raises(AssertionError):
        assert_equal(whole, broken)


QUICK = [*BASE, "distiller=dmd2", "evaluation=none", "trainer.checkpoint_every=3"]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that died after step 9 of 12, with checkpoints of 3, 6 and 9."""
    folder = tmp_path / "run"
    with killed_after(monkeypatch, 11):
        main([*QUICK, f"run_dir={folder}"])
    assert [path.name for path in checkpoint.steps(folder / "checkpoints")] == [f"step-{n:08d}" for n in (3, 6, 9)]
    return folder


def test_a_damaged_checkpoint_is_set_aside_and_never_counts_as_the_newest(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one checkpoint kept, a damaged later one in its place would leave none that is whole."""
    checkpoints = interrupted / "checkpoints"
    spoil(checkpoints / "step-00000009", "missing file")
    often = ["train", f"run_dir={interrupted}", "resume=true", "trainer.keep=1", "trainer.checkpoint_every=1"]
    with killed_after(monkeypatch, 1):
        main(often)
    assert [path.name for path in checkpoint.steps(checkpoints)] == ["step-00000007"]
    assert (checkpoints / "damaged-step-00000009").is_dir()
    assert main(often) == 0


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "cut state", "no manifest", "edited manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = interrupted / "checkpoints" / "step-00000009"
    spoil(last, damage)
    capsys.readouterr()
    assert main([*QUICK, f"run_dir={interrupted}", "resume=true"]) == 0
    shown = capsys.readouterr()
    assert f"damaged checkpoint {last}" in shown.err
    assert "going on after step 6" in shown.out
    whole = tmp_path / "whole"
    assert main([*QUICK, f"run_dir={whole}"]) == 0
    assert_equal(whole, interrupted)


def spoil(folder: Path, damage: str) -> None:
    if damage == "flipped byte":
        path = folder / "optimizer-fake_score.safetensors"
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "missing file":
        (folder / "student.safetensors").unlink()
    elif damage == "cut state":
        (folder / "state.json").write_text((folder / "state.json").read_text()[:50])
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"bytes": ', '"bytes": 1', 1))


def test_without_one_whole_checkpoint_there_is_one_message(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkpoint.steps(interrupted / "checkpoints"):
        spoil(path, "missing file")
    capsys.readouterr()
    for verb in ([*QUICK, f"run_dir={interrupted}", "resume=true"], ["sample", f"run={interrupted}"]):
        assert main(verb) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
        assert len([line for line in lines if line.startswith("warning: damaged checkpoint")]) == 3
        assert "must hold one whole checkpoint" in lines[-1]


def test_what_a_kill_left_half_written_is_never_picked_and_goes_away(interrupted: Path) -> None:
    checkpoints = interrupted / "checkpoints"
    for name in (".writing-step-00000012", ".removing-step-00000001"):
        shutil.copytree(checkpoints / "step-00000003", checkpoints / name)
    found = checkpoint.newest(checkpoints, pytest.fail)
    assert found is not None
    assert found.step == 9
    assert main([*QUICK, f"run_dir={interrupted}", "resume=true"]) == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{n:08d}" for n in (3, 6, 9, 12)]


def test_old_checkpoints_are_pruned_but_the_best_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*BASE, *INTERIM, "distiller=dmd2", "trainer.keep=2", "evaluation.every=2"]
    assert main([*words, f"run_dir={folder}"]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["evaluation/swd"] for line in lines if "evaluation/swd" in line}
    best = min(scores, key=lambda step: scores[step])
    standing = {int(path.name[5:]) for path in checkpoint.steps(folder / "checkpoints")}
    assert standing == {10, 12, best}
    assert main(["sample", f"run={folder}", "checkpoint=best", f"out={tmp_path / 'best.png'}"]) == 0
    assert main(["sample", f"run={folder}", "checkpoint=12", f"out={tmp_path / 'last.png'}"]) == 0
    assert main(["sample", f"run={folder}", "checkpoint=11", f"out={tmp_path / 'no.png'}"]) == 2


def test_checkpoints_are_read_without_pickle(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **keys: Any) -> Any:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    assert main([*QUICK, f"run_dir={interrupted}", "resume=true"]) == 0
    kinds = {path.suffix for path in (interrupted / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


# --- what resume means


def test_resume_needs_something_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*QUICK, f"run_dir={folder}", "resume=true"]) == 2
    assert "resume needs a run to go on with" in capsys.readouterr().err
    assert not folder.exists()
    assert main([*QUICK, "resume=auto"]) == 2
    assert "run_dir must be given" in capsys.readouterr().err


def test_resume_auto_begins_goes_on_and_passes_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*QUICK, f"run_dir={folder}", "resume=auto"]) == 0
    assert main([*QUICK, f"run_dir={folder}", "resume=auto"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert main([*QUICK, f"run_dir={folder}", "resume=true"]) == 2
    assert "not finished" in capsys.readouterr().err


def test_without_a_checkpoint_auto_starts_over_and_true_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    with killed_after(monkeypatch, 2):
        main([*QUICK, f"run_dir={folder}"])
    assert main([*QUICK, f"run_dir={folder}", "resume=true"]) == 2
    assert "resume=auto starts it over" in capsys.readouterr().err
    assert main([*QUICK, f"run_dir={folder}", "resume=auto"]) == 0
    assert main([*QUICK, f"run_dir={whole}"]) == 0
    assert_equal(whole, folder)


def test_a_run_goes_on_by_its_own_settings_or_equal_ones(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change in ("trainer.steps=13", "distiller.student_every=4", "distiller=consistency", "roles.student=lora"):
        assert main([*QUICK, f"run_dir={interrupted}", "resume=true", change]) == 2
        assert "as in the run that goes on" in capsys.readouterr().err
    assert main(["train", f"run_dir={interrupted}", "resume=true", "dry_run=true"]) == 0
    assert main([*QUICK, f"run_dir={interrupted}", "resume=true", "trainer.keep=1"]) == 0
    assert [path.name for path in checkpoint.steps(interrupted / "checkpoints")] == ["step-00000012"]


def test_a_folder_alone_is_enough_to_go_on(interrupted: Path) -> None:
    assert main(["train", f"run_dir={interrupted}", "resume=true"]) == 0
    assert RunFolder(interrupted).is_finished


# --- signals and locks


def test_a_kill_while_concluding_leaves_a_run_that_concludes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"

    def killed(self: Run, *args: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_summary", killed)
        with pytest.raises(KilledError):
            main([*QUICK, f"run_dir={folder}"])
    assert not RunFolder(folder).is_finished
    assert main([*QUICK, f"run_dir={folder}", "resume=true"]) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_leaves_with_a_word(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, whole = tmp_path / "run", tmp_path / "whole"
    original, count = Trainer.update, [0]

    def update(self: Trainer, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 7:
            os.kill(os.getpid(), number)
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", update)
        assert main([*QUICK, f"run_dir={folder}"]) == status
    shown = capsys.readouterr().out
    assert f"stopped by {number.name} after step" in shown
    assert "resume=true" in shown
    assert not RunFolder(folder).is_finished
    assert main([*QUICK, f"run_dir={folder}", "resume=true"]) == 0
    assert main([*QUICK, f"run_dir={whole}"]) == 0
    assert_equal(whole, folder)


def test_a_signal_during_an_evaluation_leaves_it_to_the_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffdistill.evaluation import harness

    words = [*words_of("dmd2 with a GAN, 5 to 1", tmp_path), "evaluation.every=4"]
    folder, whole, original = tmp_path / "run", tmp_path / "whole", harness.evaluate

    def evaluate(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(harness, "evaluate", evaluate)
        assert main([*words, f"run_dir={folder}"]) == 0
    assert main([*words, f"run_dir={folder}", "resume=true"]) == 0
    assert main([*words, f"run_dir={whole}"]) == 0
    assert_equal(whole, folder)


def test_a_second_run_on_one_folder_is_refused(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with RunFolder(interrupted).held():
        words = [*QUICK, f"run_dir={interrupted}", "resume=auto"]
        code = f"import sys; from diffdistill.cli import main; sys.exit(main({words!r}))"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert "must not be in use by another run" in second.stderr
    assert before == {path: path.read_bytes() for path in before}
    assert main([*QUICK, f"run_dir={interrupted}"]) == 2  # not even without resume
    assert "resume=true" in capsys.readouterr().err
