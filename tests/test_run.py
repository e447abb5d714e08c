"""Whole runs in process on the 2-D teacher, and every mistake of a user: status 2, one message, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdistill.cli import main
from diffdistill.run import Run
from diffdistill.run_pictures import RunPictures

QUICK = [
    "train", "experiment=gmm2d_dmd2", "trainer.steps=12", "trainer.batch_size=32", "trainer.log_every=4",
    "evaluation.num_samples=500", "evaluation.interim_samples=200", "evaluation.every=8", "trainer.checkpoint_every=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "x"
    assert main([*QUICK, f"run_dir={folder}"]) == 0
    return folder


def test_a_run_writes_what_it_promises_and_nothing_else(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "summary.json", "starts.json", "samples", "checkpoints", "report.html"
    }  # fmt: skip
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 8, 12]
    assert all(
        key.startswith(("student/", "critic/", "grad_norm/", "lr/", "time/", "memory/")) or key == "step"
        for key in lines[0]
    )
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step-00000008", "step-00000012"}


def test_the_summary_has_its_schema_and_protocol(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() == {
        "schema", "teacher", "student", "wall_seconds", "cpu_seconds", "iterations", "peak_memory_bytes", "protocol",
        "no_pipeline",
    }  # fmt: skip
    assert (summary["teacher"]["nfe"], summary["student"]["nfe"]) == (35, 1)
    assert {"swd", "precision", "recall", "density", "coverage", "latency_ms"} <= summary["student"].keys()
    assert summary["protocol"]["num_samples"] == 500
    assert summary["iterations"] == 12
    assert summary["peak_memory_bytes"] > 2**20


def test_no_role_is_in_training_mode_while_an_interim_evaluation_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []

    def noted(self: Run, *others: Any) -> Any:
        networks = [self.recipe.networks[role].network for role in ("student", "fake_score")]
        modes.extend(module.training for network in networks for module in network.modules())
        return figures(self, *others)

    figures = Run._figures
    monkeypatch.setattr(Run, "_figures", noted)
    monkeypatch.setattr(RunPictures, "keep", lambda self, step: None)  # it would put an end to training mode too
    assert main([*QUICK, f"run_dir={tmp_path / 'x'}", "evaluation.every=3"]) == 0
    assert modes and not any(modes)


def test_the_same_command_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main([*QUICK, f"run_dir={again}"]) == 0

    def figures(folder: Path) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if not k.startswith(("time/", "memory/")) and "latency" not in k}
            for line in lines
        ]

    assert figures(again) == figures(finished)
    for path in sorted((finished / "checkpoints" / "step-00000012").glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(again / "checkpoints" / "step-00000012" / path.name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_is_sampled_and_evaluated_with_its_averaged_weights(finished: Path, tmp_path: Path) -> None:
    assert main(["sample", f"run={finished}", "num=300", f"out={tmp_path / 'grid.png'}"]) == 0
    assert (tmp_path / "grid.png").stat().st_size > 1000
    out = tmp_path / "eval.json"
    assert main(["evaluate", f"run={finished}", "num_samples=500", f"out={out}"]) == 0
    result, summary = json.loads(out.read_text()), json.loads((finished / "summary.json").read_text())
    assert result["protocol"] == summary["protocol"]
    for key in ("swd", "precision", "coverage"):
        assert result["figures"][key] == pytest.approx(summary["student"][key])


def test_lora_roles_train_and_reload(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    words = [
        *QUICK,
        "roles.student=lora",
        "roles.fake_score=lora",
        "lora.rank=4",
        "evaluation=none",
        f"run_dir={folder}",
    ]
    assert main(words) == 0
    assert main(["sample", f"run={folder}", "num=10", f"out={tmp_path / 'grid.png'}"]) == 0


def test_bf16_trains(tmp_path: Path) -> None:
    assert main([*QUICK, "precision=bf16", "evaluation=none", f"run_dir={tmp_path / 'b'}"]) == 0


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "dry"
    assert main([*QUICK, "dry_run=true", f"run_dir={folder}"]) == 0
    assert main(["train", "experiment=digits_dmd2", "dry_run=true", f"run_dir={folder}"]) == 0
    assert not folder.exists()


MISTAKES = {
    "unknown key": (["trainer.stepz=3"], "trainer.stepz"),
    "wrong type inside a distiller": (["distiller.student_every=often"], "distiller.student_every"),
    "distiller that does not exist": (["distiller=dmd3"], "dmd2"),
    "network that does not exist": (["networks=gmm3d"], "gmm2d"),
    "guidance without a null class": (["data=gauss", "guidance.scale=3"], "guidance.scale"),
    "needs that data cannot meet": (["data=gauss", "distiller=denoising"], "null"),
    "closed-form network to copy": (["networks=gmm2d_exact"], "networks"),
    "times outside the range": (["distiller.times=[30.0]"], "distiller.times"),
    "times that rise": (["distiller.times=[1.0,2.0]"], "distiller.times"),
    "too few samples": (["evaluation.num_samples=3"], "num_samples"),
    "metric that does not fit": (["evaluation.metrics=[fd]"], "evaluation.metrics"),
    "card of a teacher without one for this protocol": (["evaluation.teacher=card", "evaluation.seed=7"], "protocol"),
    "card of an unguided teacher for a guided one": (
        ["evaluation.teacher=card", "guidance.scale=2"],
        "network evaluations",
    ),
    "role that does not exist": (["roles.critic=lora"], "roles.critic"),
    "mode that a role has not": (["roles.student=adapter"], "roles.student"),
    "lora target that matches nothing": (["roles.student=lora", "lora.targets=[nowhere]"], "lora.targets"),
    "one half of a GAN": (["distiller.gan_weight=0.1"], "critic_gan_weight"),
    "weights that are not there": (["networks.path=nowhere"], "networks.path"),
    "clip of an unknown role": (["+trainer.clip.critic=1.0"], "trainer.clip.critic"),
    "negative rate": (["trainer.optimizer.default.lr=-1.0"], "trainer.optimizer.default"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_with_status_2_one_message_and_no_folder(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, named = MISTAKES[case]
    base = (
        QUICK if not any(w.startswith(("data=", "networks=", "distiller=")) for w in words) else ["train", "data=gmm2d"]
    )
    base = [w for w in base if not (w.startswith("data=") and words[0].startswith("data="))]
    folder = tmp_path / "run"
    assert main([*base, f"run_dir={folder}", *words]) == 2
    shown = capsys.readouterr()
    assert named in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert len(shown.err.strip().splitlines()) <= 3
    assert not folder.exists()


def test_a_folder_with_another_run_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main([*QUICK, f"run_dir={finished}"]) == 2
    assert "run_dir must be new or empty" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_what_is_no_pipeline_or_run_is_refused(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, f"pipeline={tmp_path}", "data=digits"]) == 2
    assert "model_index.json" in capsys.readouterr().err
    assert main([verb, f"run={tmp_path}"]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main([verb]) == 2
    assert "Give one" in capsys.readouterr().err


def test_points_cannot_be_exported_and_the_verb_says_why(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"run={finished}", f"out={tmp_path / 'p'}"]) == 2
    assert "diffusers class" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_weights_that_are_not_finite_stop_the_run_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffdistill.networks.mlp import mlp

    network = mlp("asset:gmm2d")
    network.save(tmp_path / "sick")
    weights = load_file(tmp_path / "sick" / "model.safetensors")
    weights["inlet.bias"][0] = float("nan")
    save_file(weights, tmp_path / "sick" / "model.safetensors")
    folder = tmp_path / "run"
    assert main([*QUICK, f"networks.path={tmp_path / 'sick'}", "evaluation=none", f"run_dir={folder}"]) == 2
    shown = capsys.readouterr().err
    assert "student" in shown
    assert "must be finite" in shown
    assert not list((folder / "checkpoints").rglob("*.safetensors"))
