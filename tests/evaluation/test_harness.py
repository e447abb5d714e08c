"""harness: a sampler is judged in the space asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from torch import Tensor

from diffdistill.data import Digits, digit_scans
from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.evaluation.harness import Evaluation, draw, evaluate, read_card, write_card
from diffdistill.evaluation.metrics import measure
from diffdistill.rng import Rng

JUDGE = Evaluation(0, 200, 200, ("prdc",), 0, 100, 2, "none")


@dataclass(frozen=True)
class NoisyScans:
    """A sampler that answers with scans and noise of std .3."""

    nfe: int = 1

    def sample(self, z: Tensor, cond: Cond, rng: Rng) -> Tensor:
        return digit_scans()[0][rng.integers(1797, (len(z),))] + 0.3 * z


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
