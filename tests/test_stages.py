"""Warm starts from other runs, and recipes of several stages in one configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from interruption import assert_equal, killed_after

from diffdistill.cli import main
from diffdistill.config import compose
from diffdistill.networks.roles import Networks
from diffdistill.recipe import assemble
from diffdistill.saved_run import load_run
from diffdistill.warm_start import mix, warm_start

BASE = ["train", "data=gmm2d", "trainer.batch_size=16", "trainer.log_every=1", "evaluation=none"]
FIRST = [*BASE, "distiller=consistency", "trainer.steps=4", "trainer.optimizer.default.lr=1e-2"]
SECOND = [*BASE, "distiller=dmd2", "trainer.steps=2", "trainer.optimizer.default.lr=1e-9"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    assert main([*FIRST, f"run_dir={folder}"]) == 0
    return folder


def averaged(folder: Path, role: str = "student") -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in load_run(str(folder))[0].networks.state(role).items()}


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def test_a_role_starts_from_the_averaged_weights_of_another_run(first: Path, tmp_path: Path) -> None:
    words = [*SECOND, f"init.student=run:{first}", f"init.fake_score=run:{first}@student"]
    assert main([*words, f"run_dir={tmp_path / 'second'}"]) == 0
    source = averaged(first)
    teacher = dict(assemble(compose("train", ["data=gmm2d", "run_dir=none"])).networks.teacher.state_dict())  # type: ignore[arg-type]
    assert far(source, teacher) > 1e-4
    for role in ("student", "fake_score"):
        assert far(averaged(tmp_path / "second", role), source) < 1e-6


def test_what_was_made_from_a_role_follows_it_and_averages_begin_there(first: Path) -> None:
    settings = compose("train", ["data=gmm2d", "distiller=consistency", "run_dir=none"])
    networks = assemble(settings).networks  # type: ignore[arg-type]
    networks.track("student", lambda update: 0.9)
    warm_start(networks, {"student": f"run:{first}"}, lambda key, where: load_run(where[4:])[0].networks)
    source = averaged(first)
    assert far(dict(networks.state("student")), source) == 0
    assert far(dict(networks.state("student_ema")), source) == 0
    tracked = zip(networks.averages()["student"].average, networks.weights("student"), strict=True)
    assert all(torch.equal(average, weight) for average, weight in tracked)


def test_an_adapter_is_merged_into_a_copy_and_taken_over_by_an_equal_adapter(tmp_path: Path) -> None:
    lora = ["roles.student=lora", "lora.rank=3"]
    assert main([*FIRST, *lora, f"run_dir={tmp_path / 'a'}"]) == 0
    recipe, _ = load_run(str(tmp_path / "a"))
    merged = {k: v.clone() for k, v in recipe.networks.standalone("student").state_dict().items()}
    assert main([*SECOND, f"init.student=run:{tmp_path / 'a'}", f"run_dir={tmp_path / 'b'}"]) == 0
    assert far(averaged(tmp_path / "b"), merged) < 1e-6
    assert main([*SECOND, *lora, f"init.student=run:{tmp_path / 'a'}", f"run_dir={tmp_path / 'c'}"]) == 0
    assert far(averaged(tmp_path / "c"), averaged(tmp_path / "a")) < 1e-6


def test_heads_start_from_the_heads_of_another_run(tmp_path: Path) -> None:
    words = [*BASE, "distiller=dmd2", "distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1", "trainer.steps=1"]
    assert main([*words, "trainer.optimizer.default.lr=1e-2", f"run_dir={tmp_path / 'a'}"]) == 0
    start = f"init.discriminator=run:{tmp_path / 'a'}"
    assert main([*words, "trainer.optimizer.default.lr=1e-9", start, f"run_dir={tmp_path / 'b'}"]) == 0
    assert far(averaged(tmp_path / "b", "discriminator"), averaged(tmp_path / "a", "discriminator")) < 1e-6


# --- two runs at once


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `first`, but its student is an adapter."""
    folder = tmp_path_factory.mktemp("other") / "run"
    assert main([*FIRST, "roles.student=lora", "lora.rank=3", "trainer.seed=7", f"run_dir={folder}"]) == 0
    return folder


def student(folder: Path) -> dict[str, torch.Tensor]:
    """Its averaged weights with the adapter merged."""
    return dict(load_run(str(folder))[0].networks.standalone("student").state_dict())


def started(text: str, method: str = "dmd2") -> Networks:
    networks = assemble(compose("train", ["data=gmm2d", f"distiller={method}", "run_dir=none"])).networks  # type: ignore[arg-type]
    warm_start(networks, {"student": text}, lambda key, where: load_run(where[4:])[0].networks)
    return networks


@pytest.mark.parametrize("share", [None, 0.3, 1e-3])
def test_a_role_starts_between_two_runs_adapters_merged(share: float | None, first: Path, other: Path) -> None:
    second = f"run:{other}" if share is None else f"{share}*run:{other}"
    found, a, b = started(f"run:{first}+{second}").state("student"), student(first), student(other)
    w = 0.5 if share is None else share
    assert far(a, b) > 1e-3
    for name in a:
        torch.testing.assert_close(found[name], (1 - w) * a[name] + w * b[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("share", "end"), [("0", 0), ("0.0", 0), ("1", 1)])
def test_the_ends_are_the_runs_themselves_bit_for_bit(share: str, end: int, first: Path, other: Path) -> None:
    networks = started(f"run:{first}+{share}*run:{other}", "consistency")
    wanted = student([first, other][end])
    for role in ("student", "student_ema"):  # what is made from a role follows it
        state = networks.state(role)
        assert all(state[name].numpy().tobytes() == wanted[name].numpy().tobytes() for name in wanted)


def test_a_mix_of_equal_weights_is_these_weights_and_keeps_signs_dtypes_and_counters() -> None:
    a = {"w": torch.tensor([0.1, -0.0, 3.0]), "h": torch.tensor([0.3], dtype=torch.bfloat16), "n": torch.tensor(4)}
    for share in (0, 0.3, 0.7, 1):
        found = mix(a, {name: value.clone() for name, value in a.items()}, share)
        assert all(torch.equal(found[name], a[name]) and found[name].dtype == a[name].dtype for name in a)
    assert bool(torch.signbit(mix(a, a, 0)["w"][1]))
    assert int(mix(a, {**a, "n": torch.tensor(7)}, 0.5)["n"]) == 4


def test_a_run_trains_on_from_two_and_a_stage_may_be_one_of_them(
    two: list[str], first: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SECOND, f"init.student=run:{first}+0.25*run:{other}", f"run_dir={tmp_path / 'a'}"]) == 0
    assert far(averaged(tmp_path / "a"), mix(student(first), student(other), 0.25)) < 1e-6
    assert main([*two, f"init.student=stage:warm+run:{first}", f"run_dir={tmp_path / 'b'}"]) == 0
    warm = averaged(tmp_path / "b" / "stages" / "warm")
    assert far(averaged(tmp_path / "b"), mix(warm, student(first), 0.5)) < 1e-6
    assert main([*two, f"init.student=run:{first}+stage:wrm", f"run_dir={tmp_path / 'c'}"]) == 2
    assert "init.student must name an earlier stage" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_runs_of_two_teachers_are_not_mixed(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIRST, "networks=gmm2d_scratch", f"run_dir={tmp_path / 'scratch'}"]) == 0
    words = [f"init.student=run:{first}+run:{tmp_path / 'scratch'}", f"run_dir={tmp_path / 'run'}", "dry_run=true"]
    capsys.readouterr()
    assert main([*SECOND, *words]) == 2
    assert "init.student must mix two runs of one teacher" in capsys.readouterr().err


def test_the_run_that_goes_on_does_not_need_its_source(first: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "second"
    shutil.copytree(first, source)
    assert main([*SECOND, f"init.student=run:{source}", f"run_dir={folder}"]) == 0
    (folder / "summary.json").unlink()
    shutil.rmtree(source)
    assert main(["train", f"run_dir={folder}", "resume=true"]) == 0
    assert main(["sample", f"run={folder}", f"out={tmp_path / 'x.png'}", "num=4"]) == 0


MISTAKES = {
    "no run": ("init.student=run:nowhere", "init.student"),
    "no kind": ("init.student=runs/x", "run:DIR"),
    "no folder": ("init.student=run:", "run:DIR"),
    "a role that is not there": ("init.studnt=run:{first}", "init.studnt"),
    "a role that is not trained": ("init.target=run:{first}", "init.target"),
    "a source without the role": ("init.fake_score=run:{first}", "fake_score"),
    "a stage that is not there": ("init.student=stage:warm", "must name an earlier stage"),
    "another mode": ("init.student=run:{first} roles.student=lora", "init.student"),
    "another network": ("init.student=run:{first} data=digits", "init.student"),
    "no text": ("init.student=3", "init.student"),
    "no second run": ("init.student=run:{first}+run:nowhere", "nowhere"),
    "a second run without the role": ("init.student=run:{first}+run:{first}@fake_score", "the role fake_score"),
    "no share": ("init.student=run:{first}+half*run:{first}", "init.student must give the second source a share"),
    "a share above 1": ("init.student=run:{first}+1.5*run:{first}", "init.student must give the second source a share"),
    "a share of nan": ("init.student=run:{first}+nan*run:{first}", "init.student must give the second source a share"),
    "three": ("init.student=run:{first}+run:{first}+run:{first}", "init.student must mix two sources at most"),
    "two adapters": ("init.student=run:{first}+run:{first} roles.student=lora", "roles.student=copy"),
    "two of another network": ("init.student=run:{first}+run:{first} data=digits", "weights of this network"),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("dry", ["true", "false"])
def test_a_mistake_in_init_is_one_message_before_anything_is_written(
    case: str, dry: str, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, named = MISTAKES[case]
    given = [*SECOND, *words.format(first=first).split(), f"run_dir={tmp_path / 'run'}", f"dry_run={dry}"]
    if "data=digits" in given:
        given.remove("data=gmm2d")
    assert main(given) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert named in shown[0]
    assert not (tmp_path / "run").exists()


# --- stages

TWO = """
# @package _global_
defaults:
  - /distiller@stages.warm.distiller: consistency
  - /trainer@stages.warm.trainer: default
  - override /data: gmm2d
  - override /distiller: dmd2
  - override /evaluation: none
stages:
  warm:
    trainer: {steps: 4, batch_size: 16, log_every: 1, checkpoint_every: 2}
trainer: {steps: 4, batch_size: 16, log_every: 1, checkpoint_every: 2, optimizer: {default: {lr: 1.0e-9}}}
init:
  student: stage:warm
"""


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "two.yaml").write_text(TWO)
    return ["train", "experiment=two", "--config-dir", str(tmp_path / "configs")]


def test_two_stages_in_one_configuration(two: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*two, f"run_dir={folder}"]) == 0
    warm = folder / "stages" / "warm"
    assert json.loads((warm / "summary.json").read_text())["iterations"] == 4
    assert far(averaged(folder), averaged(warm)) < 1e-6
    assert main(["sample", f"run={folder}", f"out={tmp_path / 'x.png'}", "num=4"]) == 0


@pytest.mark.parametrize("updates", [1, 3, 6, 8])
def test_a_kill_in_any_stage_is_gone_on_from_bit_for_bit(
    updates: int, two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*two, f"run_dir={whole}"]) == 0
    with killed_after(monkeypatch, updates):
        main([*two, f"run_dir={broken}"])
    assert main([*two, f"run_dir={broken}", "resume=auto"]) == 0
    for part in ("", "stages/warm"):
        assert_equal(whole / part, broken / part)


STAGE_MISTAKES = [
    ("+stages.warm.trainr=1", "stages.warm.trainr is not a key of a stage"),
    ("stages.warm.trainer.steps=0", "steps must be >= 1"),
    ("stages.warm.trainer.steps=often", "stages.warm.trainer.steps must be an integer"),
    ("stages.warm.distiller.target_decay=2", "target_decay"),
    ("init.student=stage:wrm", "must name an earlier stage"),
    ("+stages.warm.init.student=stage:warm", "must name an earlier stage"),
    ("+stages.late.trainer=3", "stages.late.trainer"),
    ("+stages.late=3", "stages.late"),
    ("stages=3", "stages must be"),
    ("+stages.'../up'.trainer.steps=3", "stages"),
    ("init.fake_score=stage:warm", "fake_score"),
]


@pytest.mark.parametrize(("word", "message"), STAGE_MISTAKES)
def test_a_mistake_in_a_stage_is_told_before_the_first_begins(
    word: str, message: str, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*two, word, f"run_dir={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert message in shown[0]
    assert not (tmp_path / "run").exists()
