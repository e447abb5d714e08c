"""Video from configuration to folder, on a Wan transformer small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffdistill
from diffdistill import export_video, wan_parts
from diffdistill.config import compose
from diffdistill.errors import UserError
from diffdistill.evaluation import factors
from diffdistill.export import write
from diffdistill.launch import card_of
from diffdistill.networks.attention import RoleAttention
from diffdistill.networks.attention import explain as explain_attention
from diffdistill.pipelines import PipelineSampler
from diffdistill.process import RectifiedFlow
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.solvers import flow_shift

TINY = [
    "data=moving_digits", "data.frames=4", "data.size=32", "networks=moving_digits_scratch", "experiment=none",
    "networks.config.num_attention_heads=2", "networks.config.attention_head_dim=16", "networks.config.ffn_dim=64",
    "networks.config.num_layers=2", "sampler.num_steps=6", "precision=fp32",
]  # fmt: skip
TIMES = f"distiller.times={list(flow_shift(RectifiedFlow(), 2, 5.0)[:-1])}"
MASK = "{_target_: diffdistill.kernels.attention.masks.asa.ASA, density: 0.5, block: 64, sampled: 16}"
SPARSE = f"{{_target_: diffdistill.networks.attention.BlockSparse, mask: {MASK}}}"
BLADE = [*TINY, "distiller=tdm", TIMES, f"attention.student={SPARSE}"]


def settings(*words: str) -> Any:
    return {**compose("train", [*BLADE, "run_dir=none", *words]), "command": "test"}


@pytest.fixture
def recipe() -> Recipe:
    return assemble(settings())


def test_masks_are_of_their_role_alone(recipe: Recipe) -> None:
    """The student attends sparsely, the fake score and the teacher densely."""
    network = recipe.networks["student"].network
    found = explain_attention(network.transformer)
    assert found and all("ASA" in rows["student"] for rows in found.values())
    for role in ("target", "fake_score"):
        other = recipe.networks[role].network
        assert not any(isinstance(getattr(m, "processor", None), RoleAttention) for m in other.modules())


def test_attention_of_a_role_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"attention\.critic"):
        assemble(settings(f"attention.critic={SPARSE}"))
    with pytest.raises(UserError, match=r"attention\.student must have a _target_"):
        assemble(settings("attention.student=1"))
    words = ["data=gmm2d", "distiller=dmd2", "experiment=none", "run_dir=none", f"attention.student={SPARSE}"]
    points = compose("train", words)
    with pytest.raises(UserError, match=r"attention\.student"):
        assemble(points)  # type: ignore[arg-type]


def test_a_lora_student_and_a_lora_critic_share_the_backbone_of_a_dense_teacher() -> None:
    recipe = assemble(settings("roles.student=lora", "roles.fake_score=lora"))
    networks = recipe.networks
    assert networks["student"].network is networks.teacher
    batch = recipe.data.batch(Rng(0, 0, "data", range(2)), 2, recipe.needs, networks.dtype)
    for phase in recipe.distiller.phases(0):
        networks.train_only(phase.trains)
        phase.loss(batch, Rng(0, 0, phase.name, range(2))).total.backward()
    ran = {rows["ran"] for rows in explain_attention(networks.teacher.transformer).values()}
    assert ran == {"the stock processor"}  # the critic's call was the last one


def test_a_folder_runs_in_diffusers_alone_and_with_its_masks(recipe: Recipe, tmp_path: Path) -> None:
    out = write(recipe, tmp_path / "pipeline", settings(), {})  # verified inside, both ways
    call = json.loads((out / "call.json").read_text())
    assert call["call"]["num_inference_steps"] == 2 and call["nfe"] == 2 and len(call["prompts"]) == 81
    assert call["attention"]["mask"]["density"] == 0.5
    card = (out / "README.md").read_text()
    assert "from diffdistill.kernels.attention.masks.asa import ASA" in card and "ASA(density=0.5" in card
    assert card_of({"path": str(out)})[1]  # the transformer's weights, not the prompts'
    sampler = PipelineSampler.load(str(out))
    rng = Rng(0, 0, "evaluation", range(3))
    videos = sampler.sample(torch.zeros(3, *recipe.data.shape), recipe.data.conditions(rng), rng)
    assert videos.shape == (3, *recipe.data.shape) and float(videos.min()) >= -1


def test_a_folder_that_differs_is_not_written(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = export_video.flow_scheduler
    monkeypatch.setattr(export_video, "check_grid", lambda times: None)
    monkeypatch.setattr(wan_parts, "flow_scheduler", lambda times: original((1.0, 0.5)))
    with pytest.raises(UserError, match="must equal the run's own samples"):
        write(recipe, tmp_path / "pipeline", settings(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_the_schedulers_grid_is_the_samplers(num_steps: int) -> None:
    for shift in (1.0, 3.0, 5.0, 0.5):
        export_video.check_grid(flow_shift(RectifiedFlow(), num_steps, shift)[:-1])


def test_times_off_the_schedulers_grid_are_told_the_nearest() -> None:
    for times in ((1.0, 0.9, 0.5, 0.2), (0.9,), (0.9, 0.5)):
        with pytest.raises(UserError, match="nearest"):
            export_video.check_grid(times)


def test_the_factors_of_steps_and_attention(recipe: Recipe, tmp_path: Path) -> None:
    sparse = factors.attention_of(recipe)
    costs = factors.timed(recipe, recipe.distiller.generator, sparse, rounds=2)  # type: ignore[arg-type]
    assert set(costs) == {"many", "few", "sparse"}
    assert all(0 < cost.attention_seconds < cost.seconds for cost in costs.values())
    assert costs["many"].seconds > 1.5 * costs["few"].seconds  # six steps against two
    # what was installed for timing is gone
    assert all(
        "many" not in rows for rows in explain_attention(recipe.networks["student"].network.transformer).values()
    )


def test_factors_need_masks() -> None:
    with pytest.raises(UserError, match=r"evaluation\.factors"):
        factors.check(assemble({**compose("train", [*TINY, "distiller=tdm", TIMES, "run_dir=none"])}))


def test_a_run_ends_in_its_report_and_folder(tmp_path: Path) -> None:
    words = [
        *BLADE, f"run_dir={tmp_path / 'run'}", "trainer.steps=2", "trainer.batch_size=2", "evaluation.num_samples=65",
        "evaluation.batch_size=13", "evaluation.teacher=fresh", "evaluation.factors=true",
    ]  # fmt: skip
    summary = diffdistill.train(*words)
    assert set(summary["student"]) >= {"frame_fd", "frame_fd_pixel", "velocity_error", "label_agreement"}
    assert set(summary["factors"]) == {"steps", "attention", "attention_alone", "product"}
    folder = tmp_path / "run"
    report = (folder / "factors.md").read_text()
    assert (
        "teacher, 6 dense steps" in report
        and "2 dense steps, the teacher's figures" in report
        and "student, 2 sparse steps" in report
        and "Together" in report
    )
    assert (folder / "pipeline" / "model_index.json").is_file()
    assert next((folder / "samples").iterdir()).stat().st_size > 100
