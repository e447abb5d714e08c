"""harness: which figures are measured, what is refused before work, and that a sampler is judged in the space asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffdistill.data import PROCEDURAL, Data, Digits, GaussianData, Source, digit_scans
from diffdistill.denoiser import Cond
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError
from diffdistill.evaluation.harness import ON_IMAGES, ON_POINTS, Evaluation, draw, evaluate, read_card, write_card
from diffdistill.evaluation.metrics import measure
from diffdistill.evaluation.reference import Reference
from diffdistill.rng import Rng

JUDGE = Evaluation(0, 200, 200, ("prdc",), 0, 100, 2, "none")


@dataclass(frozen=True)
class NoisyScans:
    """A sampler that answers with scans and noise of std .3."""

    nfe: int = 1

    def sample(self, z: Tensor, cond: Cond, rng: Rng) -> Tensor:
        return digit_scans()[0][rng.integers(1797, (len(z),))] + 0.3 * z


@dataclass(frozen=True)
class Pictures:
    """Images without a feature network."""

    images: Tensor
    name: str = "pictures"
    provides: frozenset[str] = frozenset({"x0"})
    num_classes: int = 0
    source: Source = PROCEDURAL

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        raise NotImplementedError

    def conditions(self, rng: Rng) -> Cond:
        return {}

    def reference(self) -> Reference:
        return Reference(self.name, self.images, None)

    def features(self) -> None:
        return None


def pictures(num: int, size: int = 4) -> Pictures:
    return Pictures(torch.rand(num, 1, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("space", ["values", "features"])
def test_precision_and_recall_are_measured_in_the_space_asked_for(space: str) -> None:
    data, judge = Digits(), replace(JUDGE, prdc_space=space)
    figures, protocol = evaluate(NoisyScans(), data, judge)
    samples, labels = draw(NoisyScans(), data, 200, 0, 100)
    spaces = {
        name: measure(samples, labels, data.reference(), ["prdc"], data.features(), seed=0, prdc_space=name)[0]
        for name in ("values", "features")
    }
    assert spaces["values"] != spaces["features"]
    assert figures == spaces[space]
    assert protocol.prdc_space == space


def test_a_card_is_read_only_for_the_space_it_was_measured_in(tmp_path) -> None:
    data, judge = Digits(), replace(JUDGE, prdc_space="features")
    figures, protocol = evaluate(NoisyScans(), data, replace(judge, metrics=("prdc", "nfe")))
    write_card(tmp_path / "metrics.json", figures, protocol, "abc", "made here")
    assert read_card(tmp_path / "metrics.json", "abc", judge, data, 1) == figures
    with pytest.raises(UserError, match="prdc_space"):
        read_card(tmp_path / "metrics.json", "abc", JUDGE, data, 1)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (Digits(), ON_IMAGES),
        (GaussianData(), ON_POINTS),
        (pictures(17), ("fd_pixel", "prdc", "memorised", "latency", "nfe")),
        (pictures(16), ("prdc", "memorised", "latency", "nfe")),
        (pictures(1100, 33), ("prdc", "memorised", "latency", "nfe")),  # 1,089 values: dear, so only if asked for
        (pictures(5), ("memorised", "latency", "nfe")),
        (pictures(1), ("latency", "nfe")),
        (Pictures(torch.zeros(9, 1, 4, 4)), ("prdc", "latency", "nfe")),
    ],
    ids=["digits", "points", "enough", "too few for a covariance", "large", "too few for k", "one", "all alike"],
)
def test_unasked_are_measured_exactly_the_figures_that_the_data_has_what_they_need_for(
    data: Data, names: tuple[str, ...]
) -> None:
    judge = replace(JUDGE, metrics=None)
    assert judge.names(data) == names
    judge.check(data)
    if len(data.reference().data) < 10:  # a step towards the edge would raise in the measurement itself
        measure(torch.rand(9, *data.shape), None, data.reference(), names, None, seed=0)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("fd_pixel", pictures(16), "fd_pixel needs 17 reference samples or more, pictures has 16"),
        ("prdc", pictures(5), "prdc needs 6 reference samples or more, pictures has 5"),
        ("memorised", Pictures(torch.zeros(9, 1, 4, 4)), "memorised needs two different reference images"),
        ("fd", pictures(99), "fd needs a feature network"),
    ],
)
def test_what_the_reference_is_too_small_for_is_refused_before_work(name: str, data: Data, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(JUDGE, metrics=(name,)).check(data)


def test_a_large_reference_may_be_asked_for_its_distance() -> None:
    replace(JUDGE, metrics=("fd_pixel",), num_samples=1200).check(pictures(1100, 33))


def test_a_space_of_features_is_refused_before_work_where_there_are_none() -> None:
    with pytest.raises(UserError, match=r"evaluation.prdc_space must be values for pictures"):
        replace(JUDGE, prdc_space="features").check(pictures(9))


def test_peak_memory_is_refused_where_it_would_not_be_measured() -> None:
    with pytest.raises(UserError, match=r"evaluation\.metrics must be figures of samples.*got peak_memory"):
        replace(JUDGE, metrics=("prdc", "peak_memory")).check(Digits())


def test_nothing_is_measured_where_that_was_asked_for_whatever_an_experiment_sets() -> None:
    from diffdistill.config import build, compose

    settings = compose("train", ["experiment=shapes_t2i", "evaluation=none", "run_dir=none"])
    assert settings.evaluation.metrics  # the experiment's
    assert build(settings["evaluation"]).metrics == ()


def test_a_name_of_no_metric_is_refused_even_where_nothing_is_measured() -> None:
    from diffdistill.config import build, compose

    settings = compose("train", ["evaluation=none", "evaluation.metrics=[nowhere]", "run_dir=none"])
    with pytest.raises(UserError, match="metrics must be among"):
        build(settings["evaluation"])
