"""Where a nan came from, and that none is ever saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import chaos_steps
import pytest
import torch
from chaos_kills import QUICK, last_logged
from interruption import assert_equal

from diffdistill import checkpoint
from diffdistill.cli import main
from diffdistill.distillers.base import Batch, Pair
from diffdistill.finite import culprit
from diffdistill.trainer import Trainer

WORDS = [*QUICK, "trainer.steps=12", "trainer.keep=9", "health=null"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*WORDS, f"run_dir={folder}"]) == 0
    return folder


CASES = {
    "weight": r"student: weight layers\.\S+",
    "gradient": r"student: gradient of layers\.\S+",
    "optimizer state": r"student: optimizer state exp_avg(_sq)? of layers\.\S+",
    "data": "batch of data: x0",
}


@pytest.mark.parametrize("kind", CASES)
def test_a_nan_is_traced_and_the_run_goes_on_from_before_it(
    kind: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        for name in ("batches", "update"):  # put back afterwards
            patched.setattr(Trainer, name, getattr(Trainer, name))
        chaos_steps.poison(kind, "student", 6, 0.3)
        assert main([*WORDS, f"run_dir={run_dir}"]) == 2
    told = capsys.readouterr().err
    assert re.match(rf"error: {CASES[kind]} must be finite, at step \d+, got nan or inf\. ", told)
    assert ("Mend the data" if kind == "data" else "Lower its lr") in told
    assert "nothing was zeroed, older checkpoints stand" in told
    assert [path.name for path in checkpoint.steps(run_dir / "checkpoints")][:1] == ["step-00000005"]
    assert chaos_steps.all_finite(run_dir)
    assert last_logged(run_dir) < 12
    assert main([*WORDS, f"run_dir={run_dir}", "resume=true"]) == 0
    assert_equal(whole, run_dir)


@pytest.mark.parametrize("what", ["weight", "average", "optimizer"])
def test_a_checkpoint_that_holds_a_nan_is_not_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It came after the last gradient before the save: no loss has seen it yet."""
    original = Trainer.update

    def update(self: Trainer, *args: Any) -> Any:
        found = original(self, *args)
        step, networks, optimizers = args[2], args[3], args[4]
        if step == 9:  # the step whose end is saved
            weight = networks.weights("student")[1]
            spoilt = {
                "weight": weight.data,
                "average": networks.averages()["student"].average[1],
                "optimizer": optimizers["student"].state[weight].get("exp_avg_sq", weight.data),
            }[what]
            spoilt.view(-1)[0] = float("inf")
        return found

    monkeypatch.setattr(Trainer, "update", update)
    run_dir = tmp_path / "run"
    assert main([*WORDS, f"run_dir={run_dir}"]) == 2
    told = {
        "weight": "student: weight ",
        "average": "student: average of ",
        "optimizer": "optimizer state exp_avg_sq of ",
    }
    assert told[what] in capsys.readouterr().err
    assert [path.name for path in checkpoint.steps(run_dir / "checkpoints")] == ["step-00000005"]


def test_every_tensor_of_a_batch_is_looked_at() -> None:
    class Nothing:
        owned = ()

        def averages(self) -> dict[str, Any]:
            return {}

    good, bad = torch.zeros(2, 2), torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    label = torch.tensor([1, 2])
    cases = {
        "x0": Batch({"label": label}, (2, 2), bad),
        "cond.text": Batch({"label": label, "text": bad}, (2, 2), good),
        "pair.z": Batch({}, (2, 2), good, Pair(bad, good, {})),
        "pair.cond.text": Batch({}, (2, 2), good, Pair(good, good, {"text": bad})),
    }
    for name, batch in cases.items():
        assert culprit(batch, Nothing(), {}) == ("batch of data", name)  # type: ignore[arg-type]
    memo = Batch({"label": label}, (2, 2), good, memo={"samples": bad})  # made by a phase
    assert culprit(memo, Nothing(), {}) is None  # type: ignore[arg-type]
