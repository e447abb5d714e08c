"""A run's health: well where it is well, the right alarm where it was made sick, and nothing of the run is touched."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from health_runs import TOLD, alarms, keep, kept, row, shipped, watched
from interruption import KilledError
from safetensors.torch import load_file

import diffdistill
from diffdistill import run as run_module
from diffdistill.cli import main
from diffdistill.config import build, compose
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.base import Batch, Loss, Phase
from diffdistill.evaluation import signs, vitals
from diffdistill.evaluation.course import Course, Verdict
from diffdistill.evaluation.dissection import lag, look, untouched
from diffdistill.evaluation.health import judge
from diffdistill.evaluation.yardstick import Yardstick, energy, heeded, yardstick
from diffdistill.losses import denoising, unit_weight
from diffdistill.networks.exact import Gaussian
from diffdistill.process import EDM, NoiseProcess, RectifiedFlow
from diffdistill.recipe import assemble
from diffdistill.rng import Rng

SMALL = ("trainer.batch_size=64", "probe=null")
WELL = {
    "gmm2d_diff_instruct": ("trainer.steps=160", "trainer.ema.student.decay=0.98"),
    "gmm2d_consistency": ("trainer.steps=100", "trainer.ema.student.decay=0.98"),
    "gmm2d_kd": ("trainer.steps=100", "trainer.ema.student.decay=0.98", "pairs.num=200"),
    "gmm2d_guidance_distillation": ("trainer.steps=100", "trainer.ema.student.decay=0.98"),
    "digits_dmd2": ("trainer.steps=40", "trainer.ema.student.decay=0.8", "trainer.batch_size=16"),
}
SICK = {
    "frozen": ("experiment=gmm2d_dmd2", "trainer.steps=60"),
    "sign": ("experiment=gmm2d_diff_instruct", "trainer.steps=100"),
    "lr": ("experiment=gmm2d_dmd2", "trainer.steps=60"),
    "labels": ("experiment=gmm2d_consistency", "trainer.steps=40"),
    "critic times": ("experiment=gmm2d_dmd2", "trainer.steps=60"),
    "student times": ("experiment=gmm2d_dmd2", "trainer.steps=60"),
    "gan x 1000": ("experiment=gmm2d_dmd2", "trainer.steps=60"),
}


@pytest.mark.parametrize("name", WELL)
def test_a_healthy_run_raises_no_alarm(name: str) -> None:
    course, _, _ = watched([f"experiment={name}", *SMALL, *WELL[name]], 10 if name.startswith("digits") else 20)
    assert [verdict.line for verdict in alarms(course)] == []
    told = {verdict.name: verdict.state for verdict in judge(course)}
    for sign in ("finite", "movement", "step size", "direction", "diversity", "labels", "condition", "average"):
        assert told[sign] == "well", sign
    assert told["critic lag"] == ("well" if name in ("gmm2d_diff_instruct", "digits_dmd2") else "unknown")
    assert told["memorisation"] == ("well" if name.startswith("digits") else "unknown")  # of points it means nothing


@pytest.mark.parametrize("sickness", SICK)
def test_a_run_made_sick_on_purpose_gets_the_right_verdict(sickness: str) -> None:
    course, _, _ = watched([*SICK[sickness], *SMALL], 20, sickness)
    found = {verdict.name: verdict for verdict in alarms(course)}
    assert TOLD[sickness] in found
    verdict = found[TOLD[sickness]]
    assert verdict.figure is not None and verdict.threshold is not None and verdict.fix and verdict.step
    assert f"{verdict.figure:.3g}" in verdict.line and verdict.fix in verdict.line


@pytest.mark.slow
@pytest.mark.parametrize("name", list(shipped()))
def test_every_shipped_experiment_is_well(name: str) -> None:
    """Whole, a minute of a core for points and up to ten for digits; from the teacher where it has stages."""
    course, _, _ = watched([f"experiment={name}", "stages={}", "init={}"], 100)
    assert [verdict.line for verdict in alarms(course)] == []


# -- the run is not touched -----------------------------------------------------------------------------------------

WORDS = [
    "train", "data=gmm2d", "trainer.steps=12", "trainer.batch_size=16", "trainer.log_every=4", "evaluation=none",
    "trainer.checkpoint_every=6", "probe=null",
]  # fmt: skip
METHODS = {
    "dmd2 with a GAN": ["distiller=dmd2", "distiller.student_every=2", "distiller.gan_weight=0.1",
                        "distiller.critic_gan_weight=0.1"],
    "f-distill with its moving ratio": ["distiller=f_distill", "distiller.ratio_rate=0.5"],
    "progressive with its stages": ["distiller=progressive", "distiller.num_steps=[2,1]", "distiller.shares=[1,1]"],
    "scm by forward mode": ["distiller=scm"],
    "lora": ["distiller=vsd", "lora.rank=2"],
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / "checkpoints" / "step-00000012").glob("*.safetensors")):
        found |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit; nan, which stands for nothing yet, is itself."""
    return torch.equal(one.nan_to_num(-9.0), other.nan_to_num(-9.0))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Without what the clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/")) and "latency" not in k}
        for line in found
    ]


@pytest.mark.parametrize("case", METHODS)
def test_a_run_is_bit_equal_with_and_without_being_watched(case: str, tmp_path: Path) -> None:
    words = [*WORDS, *METHODS[case]]
    assert main([*words, "health.every=4", f"run_dir={tmp_path / 'watched'}"]) == 0
    assert main([*words, "health=null", f"run_dir={tmp_path / 'alone'}"]) == 0
    ours, theirs = weights(tmp_path / "watched"), weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    seen = [line for line in lines_of(tmp_path / "watched") if not any(key.startswith("health/") for key in line)]
    assert seen == lines_of(tmp_path / "alone")
    assert any("health/sample/std" in line for line in lines_of(tmp_path / "watched"))


def test_looking_puts_back_which_roles_train_and_torchs_generator() -> None:
    cfg = compose("train", ["data=gmm2d", "run_dir=none"])
    recipe = assemble({str(key): cfg[key] for key in cfg})
    recipe.networks.train_only(("student",))
    before = torch.random.get_rng_state()
    with untouched(recipe.distiller, recipe.networks, 0):
        recipe.networks.train_only(("fake_score",))
        torch.manual_seed(3)
    assert recipe.networks.training == ("student",)
    assert all(weight.requires_grad for weight in recipe.networks.weights("student"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_look_draws_without_dropout_and_leaves_training_the_roles_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose("train", ["data=gmm2d", "run_dir=none"])
    recipe = assemble({str(key): cfg[key] for key in cfg})
    state = build(cfg["trainer"]).start(recipe.distiller, recipe.networks)
    real, training = Yardstick.samples, []

    def drawing(self: Yardstick, sampler: Any) -> torch.Tensor:
        training.append(recipe.networks.training)
        return real(self, sampler)

    monkeypatch.setattr(Yardstick, "samples", drawing)
    recipe.networks.train_only(("student",))
    state.step = 1
    vitals.Vitals(vitals.Health(every=1, num_samples=8), recipe, 8, contextlib.nullcontext).after(state)
    assert training == [()]
    assert recipe.networks.training == ("student",)


def test_a_run_that_goes_on_measures_what_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, *METHODS["dmd2 with a GAN"], "health.every=4"]
    assert main([*words, f"run_dir={tmp_path / 'whole'}"]) == 0
    real = run_module.Run._save

    def killed(self: Any, state: Any) -> None:
        real(self, state)
        if state.step == 6:
            raise KilledError

    monkeypatch.setattr(run_module.Run, "_save", killed)
    with pytest.raises(KilledError):
        main([*words, f"run_dir={tmp_path / 'cut'}"])
    monkeypatch.setattr(run_module.Run, "_save", real)
    assert main(["train", "resume=true", f"run_dir={tmp_path / 'cut'}"]) == 0
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text())["health"] for name in ("cut", "whole")]
    assert summaries[0] == summaries[1]


def beyond(process: NoiseProcess, trained: list[float], asked: list[float]) -> float:
    """How many times beyond the times it is trained at a student is asked; data have a std of .5."""
    out = torch.zeros(1, requires_grad=True)
    seen = SimpleNamespace(role="student", t=torch.tensor(trained), out=out, network=SimpleNamespace(process=process))
    looked = SimpleNamespace(phase=SimpleNamespace(trains=("student",)), calls=[seen])
    levels = process.angle(torch.tensor(asked).double()).tan().log()
    return math.exp(vitals._ranges([looked], levels, 0.5)["times/student_beyond"])  # type: ignore[list-item]


def test_times_at_which_nothing_but_noise_is_seen_are_all_one() -> None:
    """Rectified flow begins at t = 1, where noise over signal is without bound; its law of times never gets there."""
    process = RectifiedFlow()
    assert beyond(process, [0.1, 0.97], [0.9999]) == pytest.approx(
        50 / (97 / 3), rel=1e-3
    )  # 100 standard deviations of .5
    assert beyond(process, [0.1, 0.5], [0.9]) == pytest.approx(9.0, rel=1e-3)
    assert beyond(process, [0.5, 0.9], [0.1]) == pytest.approx(9.0, rel=1e-3)
    assert beyond(process, [0.999], [0.9999]) == 1.0


def test_a_student_that_trains_on_its_own_rollout_has_each_step_in_its_turn() -> None:
    process = EDM()
    assert beyond(process, [20.0] * 4, [20.0, 0.2]) == beyond(process, [0.2] * 4, [20.0, 0.2]) == 1.0
    assert beyond(process, [0.2, 0.21], [20.0, 0.2]) == pytest.approx(20 / 0.21, rel=1e-3)
    assert beyond(process, [0.2] * 4, [20.0]) == pytest.approx(100, rel=1e-3)


# -- figures with a known value -------------------------------------------------------------------------------------


class Critic:
    """Just what `lag` needs of networks: one trained role that denoises N(mean, std^2)."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        self.network = Gaussian(EDM(), [[0.7]], [[1.3]])
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.shift = torch.nn.Parameter(torch.tensor(shift))
        self.process, self.kind = self.network.process, self.network.kind
        self.blocks: list[Any] = []

    def train_only(self, names: Any) -> None: ...

    def scale(self, t: torch.Tensor) -> torch.Tensor:
        return self.network.scale(t)

    def time(self, t: torch.Tensor) -> torch.Tensor:
        return self.network.time(t)

    def __call__(self, *inputs: Any) -> torch.Tensor:
        return self.factor * self.network(*inputs) + self.shift


def lag_of(critic: Critic) -> float:
    view = Denoiser(critic, "fake_score")  # type: ignore[arg-type]

    def loss(batch: Batch, rng: Rng) -> Loss:
        x0 = 0.7 + 1.3 * rng.normal((2048, 1))
        t = torch.exp(rng.normal((2048,)))
        return Loss({"denoising": denoising(view, x0, rng.normal((2048, 1)), t, {}, unit_weight).mean()})

    looked = look(
        Phase("critic", ("fake_score",), loss), Batch({}, (2048, 1)), Rng(0, ids=range(2048)), critic,  # type: ignore[arg-type]
        contextlib.nullcontext,
    )  # fmt: skip
    found = lag(looked, "fake_score", ())
    assert found is not None
    return found


def test_an_exact_critic_has_no_lag_and_one_that_is_off_has() -> None:
    assert abs(lag_of(Critic())) < 0.01
    assert lag_of(Critic(shift=3.0)) > 0.8
    assert lag_of(Critic(factor=0.0)) > 0.2


def test_samples_are_theirs_to_their_conditions_with_slope_one() -> None:
    denoiser = Denoiser(Gaussian(EDM(), [[-1.0], [1.0]], [[0.5], [0.5]]))
    rng = Rng(0, ids=range(4096))
    label = rng.integers(2, (4096,))
    x0 = 2.0 * label[:, None] - 1 + 0.5 * rng.normal((4096, 1))
    right, wrong = {"label": label}, {"label": 1 - label}
    found = heeded(denoiser, x0, right, wrong, 1.1, rng)
    assert found["slope"] == pytest.approx(1, abs=found["doubt"]) and found["doubt"] < 0.1
    assert heeded(denoiser, x0, wrong, right, 1.1, rng)["slope"] == pytest.approx(-1, abs=0.1)


def test_the_energy_distance_is_none_of_one_law_and_the_shift_of_far_ones() -> None:
    rng = Rng(0, ids=range(2000))
    x, y = rng.normal((2000, 2)), rng.normal((2000, 2))
    assert abs(energy(x, y)) < 0.02
    assert energy(x, y + torch.tensor([100.0, 0.0])) == pytest.approx(200, rel=0.05)


def test_the_right_law_has_the_figures_of_itself() -> None:
    cfg = compose("train", ["data=digits", "run_dir=none"])
    recipe = assemble({str(key): cfg[key] for key in cfg})
    ruler = yardstick(recipe, 256, 0)
    assert not ruler.of_teacher
    copies = torch.cat([group[: len(ruler.z) // ruler.groups] for group in ruler.right])
    found = ruler.figures(copies)
    assert found["memorised"] == 1 and found["saturated"] == 0 and found["mean"] < 0.2
    assert found["std"] == pytest.approx(1, abs=0.1) and found["spread"] == pytest.approx(1, abs=0.15)
    assert ruler.figures(copies * math.nan)["nonfinite"] == len(copies)
    assert ruler.figures(copies + 3)["saturated"] > 0.5 and ruler.figures(copies + 3)["mean"] > 2
    flat = (
        copies.view(ruler.groups, -1, 1, 8, 8).mean(1, keepdim=True).expand(-1, len(copies) // ruler.groups, -1, -1, -1)
    )
    assert ruler.figures(flat.reshape(copies.shape))["spread"] < 0.01


# -- verdicts -------------------------------------------------------------------------------------------------------


def course(figures: Mapping[str, list[float]], steps: int = 100) -> Course:
    """Measured every ten steps."""
    num = max(map(len, figures.values()))
    lines = [
        {"step": 10 * (i + 1), **{f"health/{key}": values[i] for key, values in figures.items() if i < len(values)}}
        for i in range(num)
    ]
    return Course(lines, steps)


def state(name: str, **figures: list[float]) -> str:
    keyed = {key.replace("__", "/"): values for key, values in figures.items()}
    return {verdict.name: verdict.state for verdict in judge(course(keyed))}[name]


ILL = {
    "movement": {"update__student": [0.0, 0.0]},
    "step size": {"update__student": [0.3]},
    "critic lag": {"lag__fake_score": [0.9] * 8},
    "term balance": {"term__student__own": [1.0] * 2, "term__student__gan": [50.0] * 2},
    "direction": {"sample__distance": [0.1, 1.0, 2.0, 3.0]},
    "mean": {"sample__mean": [2.0] * 8},
    "std": {"sample__std": [0.1] * 8},
    "saturation": {"sample__saturated": [0.9] * 8},
    "diversity": {"sample__spread": [0.01] * 8},
    "memorisation": {"sample__memorised": [1.0] * 8},
    "labels": {"condition__data": [-0.5], "condition__data_doubt": [0.1]},
    "guidance": {"condition__teacher": [-0.5], "condition__teacher_doubt": [0.1]},
    "condition": {"condition__student": [0.0] * 8, "condition__student_doubt": [0.1] * 8},
    "time range": {"times__student_beyond": [5.0] * 2},
    "average": {"average__student_first": [0.99, 0.98]},
    "finite": {"sample__nonfinite": [3.0]},
}
WELL_FIGURES = {
    "movement": {"update__student": [0.0, 0.01]},
    "step size": {"update__student": [0.01]},
    "critic lag": {"lag__fake_score": [0.9] * 3 + [0.2] * 5},  # it begins so
    "term balance": {"term__student__own": [1.0] * 2, "term__student__gan": [0.01] * 2},
    "direction": {"sample__distance": [5.0, 3.0, 2.0, 1.0]},
    "mean": {"sample__mean": [2.0] * 6 + [0.1] * 2},
    "std": {"sample__std": [0.1] * 6 + [1.0] * 2},
    "saturation": {"sample__saturated": [0.9] * 6 + [0.4] * 2},
    "diversity": {"sample__spread": [0.01] * 6 + [0.8] * 2},
    "memorisation": {"sample__memorised": [0.5] * 8},
    "labels": {"condition__data": [0.0], "condition__data_doubt": [0.9]},  # too few to tell
    "guidance": {"condition__teacher": [2.0], "condition__teacher_doubt": [0.1]},
    "condition": {"condition__student": [0.0] * 6 + [0.9] * 2, "condition__student_doubt": [0.1] * 8},
    "time range": {"times__student_beyond": [0.5] * 2},
    "average": {"average__student_first": [0.9, 0.7]},  # and so on to the end
    "finite": {"sample__nonfinite": [0.0]},
}


@pytest.mark.parametrize("name", ILL)
def test_each_sign_is_told_well_from_ill_and_from_not_measured(name: str) -> None:
    assert state(name, **ILL[name]) == "alarm"
    assert state(name, **WELL_FIGURES[name]) == "well"
    assert state(name, other=[0.0]) == "unknown"


def test_every_sign_has_such_a_case() -> None:
    names = [verdict.name for verdict in judge(Course([], 1))]
    assert sorted(names) == sorted([*ILL, "stall"])


def test_an_alarm_stands_with_the_step_it_was_first_raised_at() -> None:
    found = judge(course({"update/student": [0.3, 0.001, 0.001]}))
    verdict = next(v for v in found if v.name == "step size")
    assert (verdict.state, verdict.step) == ("alarm", 10)


def test_a_critic_that_hardly_moves_lags_at_once_and_a_student_far_from_its_average_steps_too_far() -> None:
    slow = {"update__student": [1e-2] * 2, "update__fake_score": [1e-5] * 2, "lag__fake_score": [0.3] * 2}
    assert state("critic lag", **slow) == "alarm"
    quick = {**slow, "update__fake_score": [1e-3] * 2}
    assert state("critic lag", **quick) == "unknown"  # not judged before two thirds of the steps
    assert state("critic lag", **{**quick, "lag__fake_score": [0.3] * 8}) == "well"
    assert state("step size", average__student=[0.5], update__student=[0.01]) == "alarm"
    assert state("step size", average__student=[0.1], update__student=[0.01]) == "well"


def test_a_student_that_does_not_heed_yet_is_not_called_well() -> None:
    assert state("condition", condition__student=[0.0] * 2, condition__student_doubt=[0.1] * 2) == "unknown"


def test_samples_are_judged_by_what_a_rough_teacher_gives_the_data() -> None:
    for sign, of in (("guidance", "teacher"), ("condition", "student")):
        rough = {f"condition__{of}": [0.33] * 8, f"condition__{of}_doubt": [0.05] * 8, "condition__data_doubt": [0.05]}
        assert state(sign, **rough) == "alarm"
        assert state(sign, **rough, condition__data=[0.5]) == "well"
        assert state(sign, **rough, condition__data=[1.0]) == "alarm"
        assert state(sign, **{**rough, f"condition__{of}": [0.1] * 8}, condition__data=[-1.0]) == "alarm"


LATE = {
    "mean": ("sample__mean", 0.1, 0.9), "std": ("sample__std", 1.0, 0.1), "saturation": ("sample__saturated", 0.0, 0.9),
    "diversity": ("sample__spread", 0.8, 0.01), "memorisation": ("sample__memorised", 0.5, 1.0),
    "condition": ("condition__student", 0.9, 0.0), "critic lag": ("lag__fake_score", 0.1, 0.95),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_two_of_three_late_looks_raise_an_alarm_and_one_does_not(name: str) -> None:
    key, good, bad = LATE[name]

    def judged(*values: float) -> str:
        doubts = {"condition__student_doubt": [0.1] * len(values)} if name == "condition" else {}
        return state(name, **{key: list(values), **doubts})

    early = [bad] * 6  # two thirds of the steps are the seventh look
    assert judged(*early, bad) == "unknown"
    assert judged(*early, good, bad, good) == judged(*early, bad, good, good, bad) == "well"
    assert judged(*early, good, bad, good, bad) == judged(*early, bad, bad) == "alarm"


def test_a_run_that_was_kept_is_judged_as_it_was(tmp_path: Path) -> None:
    ill, well = course({"sample/std": [9.0] * 8}), course({"sample/std": [1.0] * 8}, steps=200)
    for name, one in (("ill", ill), ("well", well)):
        keep(tmp_path / "kept.jsonl", name, one)
    found = dict(kept(tmp_path / "kept.jsonl"))
    assert [row(name, one) for name, one in found.items()] == [row("ill", ill), row("well", well)]
    assert [verdict.name for verdict in alarms(found["ill"])] == ["std"] and not alarms(found["well"])


def test_samples_that_vary_too_much_or_too_little_are_told_apart() -> None:
    for std, words in ((9.0, "samples vary too much"), (0.1, "samples vary too little")):
        verdict = next(v for v in judge(course({"sample/std": [std] * 8})) if v.name == "std")
        assert (verdict.state, verdict.words) == ("alarm", words)
        assert verdict.figure == pytest.approx(max(std, 1 / std))


def test_an_average_that_is_begun_again_is_not_judged_across_it() -> None:
    assert state("average", average__student_first=[0.2, 0.95]) == "unknown"
    assert state("average", average__student_first=[0.2, 0.95, 0.6]) == "well"


def test_a_run_that_writes_nothing_stalls_by_its_own_pace() -> None:
    lines = [{"step": 10 * i, "time/step_seconds": 2.0} for i in range(1, 5)]
    assert signs.stall(Course(lines, 100, idle=300.0)).state == "well"  # a line every 20 s
    assert signs.stall(Course(lines, 100, idle=500.0)).state == "alarm"
    assert signs.stall(Course(lines, 100)).state == "unknown"


# -- the doctor -----------------------------------------------------------------------------------------------------


def written(folder: Path, lines: list[dict[str, Any]], finished: bool = False, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"schema": 2, "trainer": {"steps": 100}, **settings}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def verdicts(report: Any) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in report.verdicts}


def test_the_doctor_judges_a_run_and_its_status_says_whether_it_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    well = written(tmp_path / "well", list(course({"sample/std": [1.0] * 8}).lines), finished=True)
    ill = written(tmp_path / "ill", list(course({"sample/std": [9.0] * 8}).lines))
    assert main(["doctor", f"run={well}"]) == 0
    assert main(["doctor", f"run={ill}"]) == 1
    shown = capsys.readouterr().out
    assert "finished, step 80 of 100" in shown and "stopped, step 80 of 100" in shown
    assert "samples vary too much" in shown and "lower the student's lr" in shown and "1 alarm, 1 of 17" in shown
    report = diffdistill.doctor(run=str(ill))
    assert verdicts(report)["std"].figure == pytest.approx(9.0)


def test_a_run_without_measurements_is_not_called_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = written(tmp_path / "old", [{"step": 5, "student/dmd": 0.3}])
    short = written(tmp_path / "short", [{"step": 5}], health={"every": 200})
    empty = written(tmp_path / "empty", [])
    for folder in (old, short, empty):
        assert main(["doctor", f"run={folder}"]) == 0
    shown = capsys.readouterr().out
    assert "its health was not measured" in shown and "nothing was measured before step 200" in shown
    assert shown.count("0 alarms, 0 of 17 signs") == 3
    assert all(verdict.state == "unknown" for verdict in diffdistill.doctor(run=str(old)).verdicts)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"run={tmp_path}"]) == 2
    assert main(["doctor", f"run={written(tmp_path / 'x', [])}", "data=gmm2d"]) == 2
    assert "run must stand alone" in capsys.readouterr().err


def test_a_run_that_ended_in_nan_says_so_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "r"
    sick = ["distiller=consistency", "trainer.optimizer.default.lr=1e20", f"run_dir={folder}"]
    assert main([*WORDS, *sick]) == 2
    capsys.readouterr()
    assert main(["doctor", f"run={folder}"]) == 1
    report = diffdistill.doctor(run=str(folder))
    assert report.condition.startswith("failed") and "must be finite" in verdicts(report)["finite"].words


def test_a_run_that_goes_on_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    from diffdistill.run_folder import RunFolder

    lines = [{"step": 10, "time/step_seconds": 0.01}, *course({"sample/std": [1.0] * 2}).lines]
    folder = written(tmp_path / "r", lines)
    with RunFolder(folder).held():
        assert diffdistill.doctor(run=str(folder)).condition == "going on, step 20 of 100"
        old = time.time() - 3600
        os.utime(folder / "metrics.jsonl", (old, old))
        assert verdicts(diffdistill.doctor(run=str(folder)))["stall"].state == "alarm"
        assert RunFolder(folder).in_use
    assert not RunFolder(folder).in_use
    assert diffdistill.doctor(run=str(folder)).condition == "stopped, step 20 of 100"


def test_an_alarm_is_told_once_while_training_and_again_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    words = ["distiller=consistency", "trainer.optimizer.default.lr=0.0", "health.every=4", f"run_dir={folder}"]
    assert main([*WORDS, *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count("movement: student is trained and does not move") == 2
    assert shown.count("alarm at step 5: movement") + shown.count("alarm at step 8: movement") == 1
    found = json.loads((folder / "summary.json").read_text())["health"]
    assert [v["name"] for v in found if v["state"] == "alarm" and v["name"] == "movement"] == ["movement"]
    assert importlib.import_module("diffdistill.doctor").run_health(str(folder)).status == 1


@pytest.mark.parametrize("word", ["health.every=0", "health.num_samples=7", "health.seed=-1", "health.every=often"])
def test_a_mistake_ends_with_status_2(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, word, f"run_dir={tmp_path / 'r'}"]) == 2
    assert word.partition("=")[0] in capsys.readouterr().err
