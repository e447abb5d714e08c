"""Pairs of noise and the teacher's sample: what they are, where they are kept, how they reach a batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import diffdistill
from diffdistill.cli import main
from diffdistill.config import compose
from diffdistill.errors import UserError
from diffdistill.networks.call import recorded_passes
from diffdistill.networks.lora import base_state
from diffdistill.networks.roles import Networks, Role
from diffdistill.pairs import Pairs, PairSource, with_pairs
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.saved_run import load_run

WORDS = ["data=gmm2d", "distiller=dmd", "experiment=none", "evaluation=none", "run_dir=none"]


def made(folder: Path, *overrides: str, num: int = 50, seed: int = 0, batch: int = 20) -> tuple[Recipe, Pairs]:
    settings = compose("train", [*WORDS, *overrides])
    recipe = assemble(settings)  # type: ignore[arg-type]
    return recipe, PairSource(num, seed, batch, str(folder)).prepare(recipe, settings, folder)  # type: ignore[arg-type]


def test_a_pair_is_the_teachers_own_sample_from_its_noise(tmp_path: Path) -> None:
    recipe, pairs = made(tmp_path)
    again = recipe.sampler.sample(pairs.z[:7], {"label": pairs.cond["label"][:7]}, Rng(0, ids=range(7)))
    torch.testing.assert_close(pairs.x0[:7], again)
    assert pairs.z.shape == (50, 2) and abs(float(pairs.z.std()) - 1) < 0.3
    assert set(pairs.cond["label"].tolist()) <= set(range(8))


def test_guidance_is_part_of_the_teacher(tmp_path: Path) -> None:
    _, plain = made(tmp_path)
    _, guided = made(tmp_path, "guidance.scale=3.0")
    assert torch.equal(plain.z, guided.z) and not torch.allclose(plain.x0, guided.x0)


def test_the_batch_size_of_the_teacher_does_not_matter(tmp_path: Path) -> None:
    _, one = made(tmp_path / "a", batch=20)
    _, other = made(tmp_path / "b", batch=7)
    assert torch.equal(one.z, other.z)
    torch.testing.assert_close(one.x0, other.x0)


def test_a_second_run_reads_the_cache_and_makes_no_network_call(tmp_path: Path) -> None:
    _, first = made(tmp_path)
    with recorded_passes() as passes:
        _, second = made(tmp_path)
    assert not passes and second.reused and not first.reused
    assert torch.equal(first.x0, second.x0) and second.cpu_seconds == first.cpu_seconds


@pytest.mark.parametrize(
    "change",
    [
        {"num": 51},
        {"seed": 1},
        {"over": "sampler.num_steps=9"},
        {"over": "guidance.scale=2.0"},
        {"over": "networks=gmm2d_scratch"},
        {"over": "data.std=0.1"},
    ],
    ids=str,
)
def test_whatever_decides_the_pairs_is_in_the_key(tmp_path: Path, change: dict) -> None:
    made(tmp_path)
    over = [change["over"]] if "over" in change else []
    _, other = made(tmp_path, *over, **{k: v for k, v in change.items() if k != "over"})
    assert not other.reused


def test_adapters_and_extra_inputs_on_the_shared_backbone_do_not_change_the_key(tmp_path: Path) -> None:
    recipe, _ = made(tmp_path)
    assert made(tmp_path, "roles.student=lora", "roles.fake_score=lora", "trainer.seed=3")[1].reused
    plain = {name: value.clone() for name, value in base_state(recipe.networks.teacher)}
    teacher = recipe.networks.teacher
    with_inputs = Networks(teacher, {"student": Role(inputs=("w",))}, (2,), recipe.networks.cond, {"student": "lora"})
    assert "time_embedding.roles.student.w.last.weight" in with_inputs.teacher.state_dict()
    joined = dict(base_state(with_inputs.teacher))
    assert joined.keys() == plain.keys() and all(torch.equal(joined[name], plain[name]) for name in plain)


def test_every_weight_of_the_teacher_decides_the_pairs(tmp_path: Path) -> None:
    settings = compose("train", WORDS)
    recipe, source = assemble(settings), PairSource(3, 0, 3, str(tmp_path))  # type: ignore[arg-type]
    source.prepare(recipe, settings, tmp_path)  # type: ignore[arg-type]
    assert source.prepare(recipe, settings, tmp_path).reused  # type: ignore[arg-type]
    for weight in recipe.networks.teacher.parameters():
        weight.data.view(-1)[0] += 1
        assert not source.prepare(recipe, settings, tmp_path).reused  # type: ignore[arg-type]


def test_a_weight_that_is_named_like_an_adapter_counts() -> None:
    network = torch.nn.Module()
    network.down = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    network.base = torch.nn.Linear(2, 2)
    assert {name for name, _ in base_state(network)} == set(network.state_dict())


@pytest.mark.parametrize("cache", ["", "{here}/file", "{here}/file/below", "x" * 5000])
def test_a_cache_that_can_be_no_folder_is_refused_before_anything(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    words = [f"pairs.cache='{cache.format(here=tmp_path)}'", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", "data=gmm2d", "distiller=dmd", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: pairs.cache must name a folder") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_cache_without_permission_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("diffdistill.cached_tensors.os.access", lambda path, mode: False)  # root may write anywhere
    words = [f"pairs.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}", "evaluation=none", "probe=null"]
    with recorded_passes() as passes:
        assert main(["train", "data=gmm2d", "distiller=dmd", *words]) == 2
    assert "pairs.cache must be writable: permission denied" in capsys.readouterr().err
    assert not passes


def test_a_run_written_before_there_were_pairs_goes_on(tmp_path: Path) -> None:
    words = ["data=gmm2d", "distiller=dmd2", "evaluation=none", "trainer.steps=2", "trainer.batch_size=4"]
    diffdistill.train(*words, run_dir=str(tmp_path / "old"))
    config = tmp_path / "old" / "config.yaml"
    settings = OmegaConf.load(config)
    del settings["pairs"]
    OmegaConf.save(settings, config)
    (tmp_path / "old" / "summary.json").unlink()
    load_run(str(tmp_path / "old"))
    assert diffdistill.train(*words, run_dir=str(tmp_path / "old"), resume=True)["iterations"] == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_damaged_file_is_named_and_made_anew(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture) -> None:
    _, first = made(tmp_path)
    (file,) = tmp_path.glob("pairs-*.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    else:
        save_file(load_file(file), file)  # without what says whose they are
    _, second = made(tmp_path)
    assert file.name in capsys.readouterr().err.replace("\n", "")
    assert not second.reused and torch.equal(first.x0, second.x0)
    assert made(tmp_path)[1].reused and len(list(tmp_path.iterdir())) == 1


def test_a_batch_takes_pairs_in_epochs_and_its_other_draws_are_unchanged(tmp_path: Path) -> None:
    recipe, pairs = made(tmp_path, num=12)
    data = with_pairs(recipe, pairs).data
    needs = frozenset({"x0", "pair"})
    seen = []
    for step in range(3):
        rng = Rng(0, step, "data", range(4))
        batch = data.batch(rng, 4, needs, torch.float32)
        plain = recipe.data.batch(Rng(0, step, "data", range(4)), 4, needs, torch.float32)
        assert batch.pair is not None and torch.equal(batch.x0, plain.x0)  # type: ignore[arg-type]
        seen += batch.pair.z[:, 0].tolist()
    assert sorted(seen) == sorted(pairs.z[:, 0].tolist())  # each once
    halves = [data.batch(Rng(0, 0, "data", range(i, i + 2)), 4, needs, torch.float32).pair for i in (0, 2)]
    whole = data.batch(Rng(0, 0, "data", range(4)), 4, needs, torch.float32).pair
    assert torch.equal(torch.cat([half.z for half in halves]), whole.z)  # type: ignore[union-attr]


def test_the_regression_draws_the_student_to_the_teachers_map() -> None:
    """Its own forward pass, on the pair's noise and condition."""
    recipe = assemble(compose("train", [*WORDS, "distiller.regression_weight=2.0"]))  # type: ignore[arg-type]
    recipe = with_pairs(recipe, PairSource(64, 0, 64, None).make(recipe))
    batch = recipe.data.batch(Rng(0, 0, "data", range(64)), 64, recipe.needs, torch.float32)
    phase = next(p for p in recipe.distiller.phases(0) if p.name == "student")
    recipe.networks.train_only(phase.trains)
    term = phase.loss(batch, Rng(0, 0, "student", range(64))).terms["regression"]
    pair = batch.pair
    assert pair is not None
    x = 20.0 * pair.z  # the prior's scale at the student's time
    ours = recipe.networks["student"](x, torch.full((64,), 20.0), pair.cond)
    assert float(term.detach()) == pytest.approx(float(2.0 * (ours - pair.x0).square().mean().detach()), rel=1e-5)


def test_dmd_without_regression_and_with_more_critic_steps_is_dmd2_bit_for_bit() -> None:
    dmd = ["distiller=dmd", "distiller.regression_weight=0", "distiller.student_every=5"]
    found = []
    for words in (dmd, ["distiller=dmd2"]):
        recipe = assemble(compose("train", [*WORDS[:1], *words, *WORDS[2:]]))  # type: ignore[arg-type]
        recipe.distiller.stream = lambda rng: rng.fork("same")  # type: ignore[attr-defined]
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in recipe.networks.weights("fake_score"):
                weight.add_(0.02 * torch.randn_like(weight))
        for step in range(6):
            batch = recipe.data.batch(Rng(0, step, "data", range(8)), 8, recipe.needs, torch.float32)
            for phase in recipe.distiller.phases(step):
                recipe.networks.train_only(phase.trains)
                loss = phase.loss(batch, Rng(0, step, phase.name, range(8)))
                found.append((step, phase.name, float(loss.total.detach())))
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def test_a_method_that_needs_pairs_is_refused_where_there_are_none() -> None:
    with pytest.raises(UserError, match=r"needs pair.*pairs\.num"):
        assemble(compose("train", [*WORDS, "pairs=null"]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="regression_weight"):
        assemble(compose("train", [*WORDS, "distiller.times=[20.0,1.0]"]))  # type: ignore[arg-type]


def test_a_run_keeps_its_pairs_says_what_they_cost_and_goes_on_bit_equal(tmp_path: Path) -> None:
    words = ["data=gmm2d", "distiller=dmd", "evaluation=none", "pairs.num=40", "trainer.batch_size=8", "trainer.ema={}"]
    whole = diffdistill.train(*words, "trainer.steps=6", run_dir=str(tmp_path / "whole"))
    assert whole["pairs"]["num"] == 40 and not whole["pairs"]["reused"]
    assert whole["cpu_seconds"] > 0
    diffdistill.train(
        *words, "trainer.steps=6", "trainer.checkpoint_every=3", "trainer.keep=9", run_dir=str(tmp_path / "cut")
    )
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    (tmp_path / "cut" / "summary.json").unlink()
    again = diffdistill.train(run_dir=str(tmp_path / "cut"), resume=True)
    assert again["pairs"]["reused"]
    for name in ("student", "fake_score"):
        a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000006" / f"{name}.safetensors")
                for run in ("whole", "cut"))  # fmt: skip
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["pairs"]["num"] == 40


def test_a_dry_run_and_methods_without_need_make_none(tmp_path: Path) -> None:
    diffdistill.train("data=gmm2d", "distiller=dmd", "dry_run=true", run_dir=str(tmp_path / "dry"))
    assert not (tmp_path / "dry").exists()
    diffdistill.train(
        "data=gmm2d", "distiller=sid", "evaluation=none", "trainer.steps=1", run_dir=str(tmp_path / "sid")
    )
    assert not (tmp_path / "sid" / "pairs").exists()
