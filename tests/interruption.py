"""Runs that are cut short, and the comparison of a run that went on with one that never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import checkpoint
from diffdistill.trainer import Trainer


class KilledError(BaseException):
    """Stands for a kill: nothing after it runs."""


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> Iterator[None]:
    """The process dies in the middle of a step, after this many optimizer updates."""
    original, count = Trainer.update, [0]

    def update(self: Trainer, *args: Any) -> Any:
        count[0] += 1
        if count[0] > updates:
            raise KilledError
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", update)
        with pytest.raises(KilledError):
            yield


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Tensors of the last checkpoint by file and name, metrics without times, the state's values without times."""
    last = checkpoint.steps(folder / "checkpoints")[-1]
    tensors = {f"{p.name}/{k}": v for p in sorted(last.glob("*.safetensors")) for k, v in load_file(p).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/")) and "latency" not in k}
        for line in lines
    ]
    values = json.loads((last / "state.json").read_text())
    measured = ("seconds", "cpu_seconds", "dearest", "peak_bytes")
    return tensors, metrics, {k: v for k, v in values.items() if k not in measured}


def assert_equal(ours: Path, theirs: Path) -> None:
    """Bit-equal in weights, averages, optimizers, metrics and everything else that a checkpoint holds."""
    (a, metrics_a, values_a), (b, metrics_b, values_b) = outcome(ours), outcome(theirs)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert metrics_a == metrics_b
    assert values_a == values_b
