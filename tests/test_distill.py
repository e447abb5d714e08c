"""distill: from a pipeline and prompts to a training run by a paper's recipe."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import written

import diffdistill
from diffdistill.cli import main
from diffdistill.config import compose
from diffdistill.errors import UserError
from diffdistill.networks.scheduled import schedule_of
from diffdistill.process import RectifiedFlow
from diffdistill.solvers import flow_shift

distill: Any = importlib.import_module("diffdistill.distill")  # the attribute of that name is the verb
METHODS = tuple(distill.FEW)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    for name in ("sd15", "flux"):
        written(name, folder / name)
    return folder


def words(place: Path, name: str, method: str, *more: str, steps: int | None = None) -> list[str]:
    return distill.recipe(str(place / name), str(place / "prompts.txt"), method, steps, more)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_every_recipe_composes_and_says_what_it_costs(name: str, method: str, place: Path) -> None:
    settings = compose("train", [*words(place, name, method, "data.size=[16,16]"), "run_dir=none"])
    assert settings.distiller["_target_"].lower().endswith(method.replace("_", ""))
    assert len(settings.distiller.times) == distill.FEW[method]
    lines = distill.cost(settings)
    assert "teacher: 0." in lines[0] and "student" in lines[0] and "steps of" in lines[1]


def test_one_command_ends_with_a_pipeline(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = ["trainer.steps=2", "trainer.accumulate=1", "trainer.batch_size=2", "data.size=[16,16]", "probe=null"]
    words = ["distill", str(place / "sd15"), "method=dmd2", f"prompts={place / 'prompts.txt'}", f"run_dir={run}"]
    assert main([*words, *small]) == 0
    said = capsys.readouterr().out
    assert "after arXiv:2405.14867" in said and "4 in all" in said
    contract = json.loads((run / "pipeline" / "call.json").read_text())
    assert contract["nfe"] == 4 and contract["call"]["timesteps"] == [999, 749, 499, 249]
    assert "experiment=t2i_dmd2" in (run / "config.yaml").read_text()


def test_a_flow_s_times_are_shifted_as_its_scheduler_says_for_the_size(place: Path) -> None:
    for size, tokens in ((16, 16), (64, 256)):  # latents of half the side, tokens of 2 x 2
        found = compose("train", [*words(place, "flux", "dmd2", f"data.size=[{size},{size}]"), "run_dir=none"])
        schedule = schedule_of(json.loads((place / "flux" / "scheduler" / "scheduler_config.json").read_text()))
        assert schedule.dynamic is not None
        process = RectifiedFlow(shift=schedule.shift_for(tokens))
        assert found.distiller.times == pytest.approx(flow_shift(process, 4)[:-1])
    with pytest.raises(UserError, match=r"data\.size must be given for this model"):
        words(place, "flux", "dmd2")


def test_it_is_a_function_too(place: Path, tmp_path: Path) -> None:
    keys = {"method": "tdm", "prompts": str(place / "prompts.txt"), "dry_run": True, "run_dir": str(tmp_path / "run")}
    diffdistill.distill(str(place / "flux"), "data.size=[16,16]", **keys)
    assert not (tmp_path / "run").exists()


def test_a_large_model_is_trained_by_loras(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "LARGE", 1000)
    found = words(place, "sd15", "dmd2")
    assert "roles.student=lora" in found and "roles.fake_score=lora" in found
    settings = compose("train", [*found, "run_dir=none"])
    assert settings.trainer.optimizer.default.lr == distill.LORA_RATE and settings.lora.rank == 64
    asked = compose("train", [*words(place, "sd15", "dmd2", "trainer.optimizer.default.lr=1e-5"), "run_dir=none"])
    assert asked.trainer.optimizer.default.lr == 1e-5  # what is asked for wins


def test_mistakes_are_told(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="steps must be 1 for vsd"):
        words(place, "sd15", "vsd", steps=4)
    with pytest.raises(UserError, match="steps must be >= 1"):
        words(place, "sd15", "dmd2", steps=0)
    with pytest.raises(UserError, match="model must be a pipeline folder or a hub id"):
        distill.recipe("no such folder", "p.txt", "dmd2", None, ())
    index = place / "sd15" / "unet" / "config.json"
    before = index.read_text()
    try:
        index.write_text(before.replace("UNet2DConditionModel", "KandinskyModel"))
        with pytest.raises(UserError, match="known family, got KandinskyModel. Known are: UNet2DConditionModel"):
            words(place, "sd15", "dmd2")
    finally:
        index.write_text(before)
    assert main(["distill", str(place / "sd15"), "method=dmd", f"prompts={place / 'prompts.txt'}"]) == 2
    assert main(["distill", str(place / "sd15"), "method=dmd2"]) == 2
