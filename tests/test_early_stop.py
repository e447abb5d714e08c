"""A run ends when a figure is good enough or has long not become better, exactly so after an interruption too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interruption import KilledError

from diffdistill import run as run_module
from diffdistill.cli import main
from diffdistill.errors import UserError
from diffdistill.evaluation.early_stop import EarlyStop, loss_of
from diffdistill.run_folder import RunFolder

WORDS = [
    "train", "data=gmm2d", "distiller=consistency", "trainer.steps=24", "trainer.batch_size=8", "trainer.keep=20",
    "trainer.log_every=4", "evaluation.every=4", "evaluation.teacher=none", "evaluation.metrics=[swd]",
    "evaluation.num_samples=40", "evaluation.interim_samples=40", "probe=null",
]  # fmt: skip


def lines(*values: float, metric: str = "swd") -> list[dict[str, Any]]:
    return [{"step": 4 * (i + 1), f"evaluation/{metric}": value} for i, value in enumerate(values)]


def test_a_target_is_reached_in_the_metrics_own_direction() -> None:
    lower, higher = EarlyStop("swd", target=0.5), EarlyStop("recall", target=0.5)
    assert lower.reason(lines(0.9, 0.6)) is None
    assert higher.reason(lines(0.1, 0.4, metric="recall")) is None
    found = lower.reason(lines(0.9, 0.5))
    assert found is not None and (found.step, found.value) == (8, 0.5)
    assert higher.reason(lines(0.4, 0.5, metric="recall")) is not None
    assert higher.reason(lines(0.6, 0.4, metric="recall")) is None  # the last one counts


def test_patience_counts_evaluations_without_a_new_best() -> None:
    stop = EarlyStop("swd", patience=2)
    assert stop.reason(lines(0.5, 0.6)) is None
    assert stop.reason(lines(0.5, 0.6, 0.4, 0.4)) is None  # an equal one is no new best, and one is not two
    found = stop.reason(lines(0.5, 0.4, 0.4, 0.7))
    assert found is not None and (found.step, found.best_step, found.best) == (16, 8, 0.4)
    assert EarlyStop("recall", patience=2).reason(lines(0.5, 0.6, 0.7, metric="recall")) is None
    assert EarlyStop("recall", patience=2).reason(lines(0.7, 0.6, 0.5, metric="recall")) is not None
    assert EarlyStop().reason(lines(0.5, 0.6, 0.7, 0.8)) is None


@pytest.mark.parametrize(("metric", "best"), [(None, 8), ("swd", 8), ("recall", 4)])
def test_the_best_checkpoint_is_the_best_by_the_same_metric(metric: str | None, best: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, swd, recall in ((4, 0.5, 0.9), (8, 0.1, 0.2), (12, 0.3, 0.5)):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        folder.add_metrics(step, {"evaluation/swd": swd, "evaluation/recall": recall})
    assert folder.best_step(metric) == best
    assert loss_of({"evaluation/recall": 0.9}, "recall") == -0.9


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Evaluations inside a run find these, in this order of steps."""
    real = run_module.harness.evaluate

    def evaluate(sampler: Any, data: Any, evaluation: Any, *where: Any) -> Any:
        figures, protocol = real(sampler, data, evaluation, *where)
        return {**figures, "swd": next(found, figures["swd"])}, protocol

    found = iter(values)
    monkeypatch.setattr(run_module.harness, "evaluate", evaluate)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_ends_at_its_target_as_at_any_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, [0.9, 0.3])
    words = [*WORDS, "evaluation.stop.metric=swd", "evaluation.stop.target=0.4", f"run_dir={tmp_path / 'r'}"]
    assert main(words) == 0
    found = summary(tmp_path / "r")
    assert found["iterations"] == 8 and "swd" in found["student"]
    assert found["early_stop"]["step"] == 8 and found["early_stop"]["why"] == "reached the target 0.4"
    assert "ended early: swd reached the target 0.4" in capsys.readouterr().out.replace("\n", " ")
    assert main([*words, "resume=auto"]) == 0  # it is finished


def test_a_run_ends_when_patience_does_and_its_best_checkpoint_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.5, 0.2, 0.3, 0.4])
    folder = tmp_path / "r"
    stop = ["evaluation.stop.metric=swd", "evaluation.stop.patience=2", "trainer.keep=1"]
    assert main([*[w for w in WORDS if "keep" not in w], *stop, f"run_dir={folder}"]) == 0
    assert summary(folder)["iterations"] == 16
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-00000008", "step-00000016"}
    assert main(["sample", f"run={folder}", "checkpoint=best", f"out={tmp_path / 'best.png'}"]) == 0


def test_patience_survives_an_interruption_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the second evaluation: the first two count when it goes on."""
    folder, real = tmp_path / "r", run_module.Run._save
    words = [*WORDS, "evaluation.stop.metric=swd", "evaluation.stop.patience=2", f"run_dir={folder}"]

    def killed(self: Any, state: Any) -> None:
        real(self, state)
        if state.step == 8:
            raise KilledError

    monkeypatch.setattr(run_module.Run, "_save", killed)
    scripted(monkeypatch, [0.2, 0.3])
    with pytest.raises(KilledError):
        main(words)
    monkeypatch.setattr(run_module.Run, "_save", real)
    scripted(monkeypatch, [0.4, 0.1, 0.1, 0.1])
    assert main(["train", "resume=true", f"run_dir={folder}"]) == 0
    assert summary(folder)["iterations"] == 12 and summary(folder)["early_stop"]["best_step"] == 4


def test_a_run_that_was_cut_short_after_its_early_end_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "r", run_module.Run._conclude
    words = [*WORDS, "evaluation.stop.metric=swd", "evaluation.stop.target=0.4", f"run_dir={folder}"]

    def killed(self: Any, *given: Any) -> Any:
        raise KilledError

    monkeypatch.setattr(run_module.Run, "_conclude", killed)
    scripted(monkeypatch, [0.3])
    with pytest.raises(KilledError):
        main(words)
    monkeypatch.setattr(run_module.Run, "_conclude", real)
    assert main(["train", "resume=true", f"run_dir={folder}"]) == 0
    assert summary(folder)["iterations"] == 4


MISTAKES = {
    "a metric that nobody knows": (["evaluation.stop.metric=beauty", "evaluation.stop.target=1"], "stop.metric"),
    "a metric that is not measured": (["evaluation.stop.metric=fd", "evaluation.stop.target=1"], "stop.metric"),
    "a metric without a direction": (["evaluation.stop.metric=nfe", "evaluation.stop.target=1"], "stop.metric"),
    "no evaluations inside": (
        ["evaluation.stop.metric=swd", "evaluation.stop.target=1", "evaluation.every=0"], "evaluation.every",
    ),
    "no evaluations at all": (
        ["evaluation=none", "evaluation.stop.metric=swd", "evaluation.stop.target=1"], "stop.metric",
    ),
    "neither target nor patience": (["evaluation.stop.metric=swd"], "stop.patience"),
    "a target of nothing": (["evaluation.stop.target=1"], "stop.metric"),
    "no patience": (["evaluation.stop.metric=swd", "evaluation.stop.patience=0"], "stop.patience"),
    "a target that is no number": (["evaluation.stop.metric=swd", "evaluation.stop.target=nan"], "stop.target"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_with_status_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = MISTAKES[case]
    base = [w for w in WORDS if not (words[0] == "evaluation=none" and w.startswith("evaluation."))]
    assert main([*base, f"run_dir={tmp_path / 'r'}", *words]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_direct_call_refuses_them_too() -> None:
    with pytest.raises(UserError, match="patience"):
        EarlyStop("swd", patience=-1)
