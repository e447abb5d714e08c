"""The probe: every right reading is accepted, every wrong one refused with the right one named."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Signs, oracle
from tiny_families import TINY
from torch import Tensor

import diffdistill
from diffdistill import UserError
from diffdistill.config import compose
from diffdistill.data import GaussianData, Mixture2D
from diffdistill.distillers.base import Batch
from diffdistill.networks.exact import Gaussian, mixture_on_circle
from diffdistill.networks.files import resolve
from diffdistill.probe import Probe
from diffdistill.probe_residuals import Asked, Errors
from diffdistill.probe_search import survives
from diffdistill.probe_verdict import Verdict
from diffdistill.process import EDM, EPS, VELOCITY, VP, X0, BoundaryF, F, Negated, RectifiedFlow, Trig, V
from diffdistill.readings import Inputs, Reading, declared, kinds, other_inputs
from diffdistill.recipe import assemble
from diffdistill.rng import Rng

PROCESSES = {"edm": EDM(), "vp": VP(), "rf": RectifiedFlow(), "trig": Trig(sigma_data=0.5)}
QUICK = Probe(num_samples=8, levels=4)
OWN = ("sd15", "sd3", "stable_audio")  # of the families, where all of them would take minutes


def few(*names: str) -> list[Any]:
    """Every family, those not named among the slow ones."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


FEW = few(*OWN)
# one that predicts noise, one v, one a flow's velocity; told words, and told classes
SORTS = few("sd15", "stable_audio", "sd3", "dit")
SHAPES = ("data=shapes_t2i", "experiment=shapes_t2i")


def network_of(name: str) -> Any:
    tiny = TINY[name]
    network = tiny.network()
    network.check(tiny.shape, network.num_classes)
    return network


def found(name: str, truth: Reading, stored: bool = True, **more: Any) -> Verdict:
    return QUICK.examine(oracle(TINY[name], truth, **more), Signs(TINY[name], stored))


def refusal(verdict: Verdict) -> str:
    with pytest.raises(UserError) as refused:
        verdict.refuse({})
    return str(refused.value)


def same(one: Reading, other: Reading) -> bool:
    """Whether two readings are one at some noise levels: the same state, time and meaning of the output."""
    ratios = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    return all(torch.allclose(a, b, rtol=2e-3) for a, b in zip(_at(one, ratios), _at(other, ratios), strict=True))


def _at(reading: Reading, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs = reading.inputs
    t = inputs.process.time_at(torch.atan(ratios))
    factors = inputs.scale(t) * inputs.process.alpha_sigma(t)[1]
    return inputs.time(t), factors, torch.stack(reading.kind.row(inputs.process, t))


@pytest.mark.parametrize("name", PROCESSES)
def test_a_gaussian_is_denoised_as_a_straight_line_would(name: str) -> None:
    network = Gaussian(PROCESSES[name], [[0.7]], [[1.3]])
    verdict = Probe().examine(network, GaussianData(), dtype=torch.float64)
    assert verdict.declared is not None and verdict.better is None
    assert verdict.declared.residuals == pytest.approx([1.0] * 6, abs=0.12)  # of 1,024 samples
    for kind in (EPS, V, VELOCITY):
        said = replace(declared(network), kind=kind)
        network = Gaussian(PROCESSES[name], [[0.7]], [[1.3]])
        network.form = "denoiser"
        wrong = Misread(network, said)
        better = Probe().examine(wrong, GaussianData(), dtype=torch.float64).better
        assert better is not None and "the clean sample" in better.reading.what


class Misread:
    """A network declared otherwise than it is."""

    def __init__(self, network: Any, said: Reading) -> None:
        self.network, self.process, self.kind = network, said.inputs.process, said.kind
        self.scale, self.time = said.inputs.scale, said.inputs.time
        self.null, self.blocks = network.null, network.blocks

    def __call__(self, *inputs: Any) -> Tensor:
        return self.network(*inputs)


@pytest.mark.parametrize("name", TINY)
def test_a_right_reading_is_accepted(name: str) -> None:
    verdict = found(name, declared(network_of(name)))
    verdict.refuse({})
    assert verdict.declared is not None and verdict.declared.fits and max(verdict.declared.residuals) < 0.95
    assert verdict.condition == pytest.approx(1, abs=0.2)
    assert "is read as it was trained" in verdict.lines()[0]


CONFUSED = (EPS, X0, V, VELOCITY)


@pytest.mark.parametrize("name", SORTS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["likely", "all"])
def test_another_prediction_kind_is_refused(name: str, every: bool) -> None:
    network = network_of(name)
    for truth in kinds(network, declared(network).inputs)[1:]:
        if same(truth, declared(network)) or (truth.kind in CONFUSED) == every:
            continue
        verdict = found(name, truth)
        assert verdict.better is not None and same(verdict.better.reading, truth), truth.what
        message = refusal(verdict)
        assert verdict.better.reading.what in message and f"{verdict.better.residual:.3g}" in message
        assert verdict.declared is not None and f"{verdict.declared.residual:.3g}" in message


def likely(network: Any) -> list[Inputs]:
    """One of each sort of other inputs."""
    wanted = (
        "other way",
        "1000 times that",
        "0.001 times that",
        "shift of 3",
        "shift of 0.333",
        "sigma_data 0.5",
        "its data are 0.182",
        "0, 1], these",
        "linear betas from 0.0001",
        "a rectified flow, told times 0 to 1000",
    )
    every = list(other_inputs(network, True))
    if network.kind == V:  # linear betas are 2 percent from scaled ones there
        wanted = wanted[:-2] + wanted[-1:]
    there = [[inputs for inputs in every if part in inputs.what] for part in wanted]
    assert all(there[:-2])  # its own process is no other one
    return [found[0] for found in there if found]


def left_by(reading: Reading, network: Any, data: Signs) -> float:
    """What a reading leaves of the samples that QUICK asks about; infinite where it fits nowhere."""
    rng = Rng(QUICK.seed, 0, "probe", range(8))
    batch = data.batch(rng.fork("data"), 8, frozenset({"x0"}), torch.float32)
    assert batch.x0 is not None
    finding = Asked(network, batch.x0, batch.cond, rng, QUICK.levels, 8).finding(reading)
    return math.inf if finding is None else finding.residual


def unnoticed(name: str, every: list[Inputs]) -> list[str]:
    """Of networks trained on other inputs, those not refused: none of them leaves decisively less than the declared
    reading. What is named for the others is what they were trained on, or its equal."""
    network, missed = network_of(name), []
    for inputs in every:
        truth = Reading(inputs, network.kind)
        if same(truth, declared(network)) and (inputs.factor, inputs.offset) == (1, 0):
            continue
        verdict = found(name, truth)
        better = verdict.better
        if better is not None and better.reading.what == truth.what:
            continue
        least = left_by(truth, oracle(TINY[name], truth), Signs(TINY[name]))
        if better is None:
            assert verdict.declared is not None
            assert least > (1 - QUICK.margin) * verdict.declared.residual, (inputs.what, least)
            missed.append(inputs.what)
        else:
            assert better.residual <= 1.005 * least, (better.reading.what, truth.what, better.residual, least)
    return missed


@pytest.mark.parametrize("name", few("sd15", "sd3"))  # betas and a flow
def test_other_inputs_are_refused(name: str) -> None:
    network = network_of(name)
    assert not unnoticed(name, likely(network))


@pytest.mark.parametrize(
    ("factor", "offset", "what"),
    [(0.5, 0.5, "its data lie in [-1, 1], these in [0, 1]"), (2.0, -1.0, "its data lie in [0, 1], these in [-1, 1]")],
)
def test_data_in_another_range_are_refused(factor: float, offset: float, what: str) -> None:
    network = oracle(TINY["sd15"], declared(network_of("sd15")))
    assert what in refusal(QUICK.examine(network, Signs(TINY["sd15"], factor=factor, offset=offset)))


def test_a_flow_that_is_told_shifted_times_is_refused() -> None:
    own = declared(network_of("sd3"))

    def time(t: Tensor) -> Tensor:  # three times the noise-to-signal ratio
        return own.inputs.time(3 * t / (1 + 2 * t))

    truth = Reading(replace(own.inputs, time=time), own.kind)
    assert "the time that a shift of 3 leads to" in refusal(found("sd3", truth))


@pytest.mark.parametrize("name", ["sd3", "wan", "flux"])
def test_a_flow_that_runs_from_noise_to_data_is_refused(name: str) -> None:
    network = network_of(name)
    own = declared(network)
    turned = replace(own.inputs, what="its time runs the other way", time=lambda t: network.time(1 - t))
    verdict = found(name, Reading(turned, Negated(VELOCITY)))
    assert verdict.better is not None
    assert "other way" in verdict.better.reading.what and "sign turned" in verdict.better.reading.what


@pytest.mark.parametrize(
    ("name", "change"),
    [("sd15", {"zero_terminal_snr": True}), ("sd21", {"snr_shift": 3.0}), ("cogvideox", {"snr_shift": 3.0})],
)
def test_schedules_that_differ_by_little_are_told_apart(name: str, change: dict[str, Any]) -> None:
    own = declared(network_of(name))
    assert isinstance(own.inputs.process, VP)
    truth = Reading(replace(own.inputs, process=replace(own.inputs.process, **change)), own.kind)
    better = Probe().examine(oracle(TINY[name], truth), Signs(TINY[name])).better
    assert better is not None and same(better.reading, truth)


@pytest.mark.parametrize(("name", "of_fed"), [("flux", 1.0), ("hunyuan_video", 0.001)])
def test_the_convention_of_a_scale_input(name: str, of_fed: float) -> None:
    """w itself to Flux, whose model multiplies by 1000, and 1000 w to HunyuanVideo, as their pipelines tell it."""
    own = declared(network_of(name))
    right = found(name, own, w_of=lambda fed: of_fed * fed)
    right.refuse({})
    assert right.declared is not None and right.declared.fits
    added = refusal(found(name, own, w_of=lambda fed: of_fed * fed + 1))
    assert "counts from 0" in added
    thousand = refusal(found(name, own, w_of=lambda fed: of_fed * fed * 1000))
    assert "the scale, not 1000 times it" in thousand


def test_conditions_of_other_samples_are_refused() -> None:
    class Swapped(Signs):
        def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
            batch = super().batch(rng, global_batch, needs, dtype)
            return replace(batch, cond={**batch.cond, "text": -batch.cond["text"]})

    tiny = TINY["sd15"]
    network = oracle(tiny, declared(network_of("sd15")))
    verdict = Probe().examine(network, Swapped(tiny))
    assert verdict.condition is not None and verdict.condition < 0.5
    assert "best with their condition" in refusal(verdict)


def test_a_condition_that_changes_nothing_is_told() -> None:
    verdict = found("sd15", declared(network_of("sd15")), blind=True)
    assert math.isnan(verdict.condition or 0)
    verdict.refuse({})
    assert "guidance does nothing" in verdict.lines()[1]


@pytest.mark.parametrize("name", SORTS)
def test_untrained_weights_are_told_and_not_refused(name: str) -> None:
    verdict = QUICK.examine(network_of(name), Signs(TINY[name]))
    verdict.refuse({})
    assert "under no reading that is known" in verdict.lines()[0]


@pytest.mark.parametrize("name", [name for name in few("stable_audio", "sd15") if name != "sd15"])
def test_samples_of_untrained_weights_are_no_evidence(name: str) -> None:
    verdict = Probe(num_samples=4, levels=4).examine(network_of(name), Signs(TINY[name], stored=False))
    verdict.refuse({})
    assert "under no reading that is known" in verdict.lines()[0]


def test_a_reading_that_is_worse_anywhere_is_not_better() -> None:
    """A teacher that is poor at high noise is not misread for that."""
    own = Errors(torch.tensor([0.5, 0.5, 0.5]), 0.5, 1.0)
    for residual, sound in ((0.4, True), (0.5, True), (0.505, True), (0.6, False)):
        assert survives(replace(own, each=torch.full((3,), residual)), own) == sound
    bad = replace(own, each=torch.full((3,), 4.0))
    for residual, sound in ((1.0, True), (1.5, False)):  # better than the declared one, and no denoiser
        assert survives(replace(own, each=torch.full((3,), residual)), bad) == sound
    noisy = replace(own, each=torch.tensor([0.2, 0.9, 0.5]))  # .53: within the noise of three samples
    assert survives(noisy, own)


def test_constants_are_no_samples() -> None:
    """A reading under which all samples are constants leaves nothing: here the clean sample, on a flow told angles."""
    network = network_of("sd3")
    inputs = next(i for i in other_inputs(network, False) if "TrigFlow" in i.what)
    better = found("sd3", Reading(inputs, network.kind), stored=False).better
    assert better is not None and max(better.residuals) >= 0.2


def test_silence_is_no_reading() -> None:
    """A network that answers 0 leaves a straight line's residual as F: that is no evidence."""
    network = mixture_on_circle(EDM(), 8, 1.0, 0.05)
    network.forward = lambda x, t, cond: torch.zeros_like(x)  # type: ignore[method-assign]
    network.kind = EPS
    verdict = Probe().examine(network, Mixture2D(), dtype=torch.float64)
    assert verdict.better is None and "no reading" in verdict.lines()[0]


def test_data_that_do_not_vary_say_nothing() -> None:
    class Still(Signs):
        def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
            batch = super().batch(rng, global_batch, needs, dtype)
            return replace(batch, x0=torch.zeros(batch.shape))

    verdict = Probe().examine(network_of("sd15"), Still(TINY["sd15"]))
    verdict.refuse({})
    assert "do not vary" in verdict.lines()[0]


@pytest.mark.parametrize("name", FEW)
def test_without_data_its_own_samples_tell(name: str) -> None:
    network = network_of(name)
    right = found(name, declared(network), stored=False)
    right.refuse({})
    assert right.own and right.declared is not None and right.declared.consistent
    assert "its own samples" in right.lines()[0]
    for truth in kinds(network, declared(network).inputs)[1:]:
        if truth.kind in CONFUSED and not same(truth, declared(network)):
            assert "slopes off by" in refusal(found(name, truth, stored=False)), truth.what


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_all_other_inputs_are_refused(name: str) -> None:
    missed = unnoticed(name, [i for i in other_inputs(network_of(name), True) if i.w is None or i.w == 1])
    near = ("rescale_betas_zero_snr", "linear betas", "sigma_data 1", "shift of 0.5")  # on these data
    assert all(any(part in what for part in near) for what in missed), missed


# -- trained networks ------------------------------------------------------------------------------------------


class WithoutSamples:
    """Data that keep their samples to themselves."""

    provides: frozenset[str] = frozenset()

    def __init__(self, data: Any) -> None:
        self.data, self.shape = data, data.shape

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        return self.data.batch(rng, global_batch, needs, dtype)


@pytest.mark.parametrize("words", [("data=gmm2d",), ("data=digits",), SHAPES], ids=["gmm2d", "digits", "shapes"])
def test_shipped_teachers_are_read_as_they_were_trained(words: tuple[str, ...]) -> None:
    recipe = assemble(compose("train", [*words, "run_dir=none"]))
    for data in (recipe.data, WithoutSamples(recipe.data)):
        verdict = Probe(margin=0.01).examine(recipe.networks.teacher, data)  # type: ignore[arg-type]
        verdict.refuse({})
        assert verdict.declared is not None and verdict.declared.consistent
        assert data is not recipe.data or verdict.condition == pytest.approx(1, abs=0.1)


MISTAKES: dict[str, tuple[Callable[[Reading], Reading], str]] = {
    "kind": (lambda own: replace(own, kind=EPS), "EDM's F at sigma_data 0.5"),
    "sign": (lambda own: replace(own, kind=Negated(own.kind)), "EDM's F at sigma_data 0.5"),
    "sigma_data": (lambda own: replace(own, kind=F(1.0)), "EDM's F at sigma_data 0.5"),
    "time": (
        lambda own: replace(own, inputs=replace(own.inputs, time=lambda t: torch.log(t) / 4)), "1000 times that time",
    ),
    "c_in": (
        lambda own: replace(own, inputs=replace(own.inputs, scale=torch.ones_like)), "divided by its standard",
    ),
    "process": (
        lambda own: Reading(replace(own.inputs, process=VP(), time=lambda t: t, scale=torch.ones_like), own.kind),
        "EDM's noise levels, told 250 ln sigma",
    ),
}  # fmt: skip


# another kind stands for the other outputs: the sign and sigma_data
OUTPUTS = ("sign", "sigma_data")


@pytest.mark.parametrize("mistake", [pytest.param(m, marks=[pytest.mark.slow] * (m in OUTPUTS)) for m in MISTAKES])
def test_a_shipped_teacher_that_is_misread_is_refused(mistake: str) -> None:
    recipe = assemble(compose("train", ["data=digits", "run_dir=none"]))
    network = recipe.networks.teacher
    assert isinstance(network.kind, BoundaryF)
    change, wanted = MISTAKES[mistake]
    message = refusal(Probe().examine(Misread(network, change(declared(network))), recipe.data))
    assert wanted in message, message


# -- the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def mislabelled(tmp_path: Path) -> Path:
    """The shipped pipeline of shapes, its scheduler telling another prediction."""
    folder = tmp_path / "pipeline"
    shutil.copytree(resolve("asset:shapes_t2i"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config["prediction_type"] = "epsilon" if config.get("prediction_type") == "v_prediction" else "v_prediction"
    file.write_text(json.dumps(config))
    return folder


def test_training_is_refused_before_anything_is_written(
    mislabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffdistill.cli import main

    words = [*SHAPES, f"networks.path={mislabelled}", "evaluation=none", "trainer.steps=1", "probe.num_samples=4"]
    assert main(["train", *words, f"run_dir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert "must read the teacher as it was trained" in message and "scheduler_config.json" in message
    assert not (tmp_path / "run").exists()
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("left_out", ["trainer", "trainer.seed", "networks", "sampler", "probe"])
def test_doctor_is_told_what_its_recipe_lacks(left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    from diffdistill.cli import main

    assert main(["doctor", f"~{left_out}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {left_out}")


def test_doctor_asks_a_teacher_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = importlib.import_module("diffdistill.cli")
    assert report.main(["doctor", "data=gmm2d"]) == 0
    printed = capsys.readouterr().out
    assert "is read as it was trained" in printed and "packages" not in printed
    told = diffdistill.doctor(overrides=["data=gmm2d", "probe.levels=3"])
    assert len(told["residuals"]) == 3 and told["condition"] == pytest.approx(1, abs=0.05)
    with pytest.raises(UserError, match="must not be null"):
        diffdistill.doctor(overrides=["data=gmm2d", "probe=null"])


def test_a_run_is_asked_once_and_not_where_it_is_told_not_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["experiment=gmm2d_dmd2", "trainer.steps=2", "trainer.checkpoint_every=1", "evaluation=none"]
    diffdistill.train(*words, run_dir=str(tmp_path / "a"))
    assert capsys.readouterr().out.count("probe: ") == 1
    diffdistill.train(*words, "probe=null", run_dir=str(tmp_path / "b"))
    assert "probe: " not in capsys.readouterr().out
    (tmp_path / "a" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000002")
    # a run that goes on is not asked again, and another probe is no other recipe
    diffdistill.train(*words, "probe.levels=3", run_dir=str(tmp_path / "a"), resume=True)
    assert "probe: " not in capsys.readouterr().out


def test_the_training_s_own_draws_are_not_touched(tmp_path: Path) -> None:
    losses = []
    for probe in ("probe.levels=3", "probe=null"):
        folder = tmp_path / probe.replace("=", "-")
        diffdistill.train("experiment=gmm2d_dmd2", "trainer.steps=3", "trainer.log_every=1", "evaluation=none", probe,
                          run_dir=str(folder))  # fmt: skip
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([{k: v for k, v in line.items() if not k.startswith(("time", "memory"))} for line in lines])
    assert losses[0] == losses[1]


def test_the_levels_are_those_the_process_has() -> None:
    network = Gaussian(EDM(0.5, 3.0), [[0.0]], [[0.5]])
    verdict = Probe(levels=3).examine(network, GaussianData(((0.0,),), ((0.5,),)), dtype=torch.float64)
    assert 0.9 < verdict.levels[0] < 1.1 and 5.5 < verdict.levels[-1] < 6.5
