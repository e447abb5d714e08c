"""Laws of consistency pairs, their curricula and weights."""

from __future__ import annotations

import math

import pytest
import torch

from diffdistill.distillers.consistency.pairs import (
    ConstantSteps,
    DoublingSteps,
    EasyPairs,
    GridPairs,
    inverse_gap,
)
from diffdistill.errors import UserError
from diffdistill.process import EDM, RectifiedFlow, Trig
from diffdistill.rng import Rng
from diffdistill.solvers import karras, uniform
from diffdistill.times import LogNormal, UniformTime

EDM20 = EDM(0.002, 20.0)


def rng(step: int = 0, count: int = 20_000) -> Rng:
    return Rng(5, step, "pairs", range(count))


def test_grid_pairs_are_neighbours_and_every_interval_is_drawn_equally_often() -> None:
    t, r = GridPairs(karras, ConstantSteps(7), None)(rng(), EDM20)
    times = torch.tensor(karras(EDM20, 7), dtype=torch.float64)
    index = torch.tensor([int((times == value).nonzero()[0, 0]) for value in t])
    assert torch.equal(times[index + 1], r)
    share = torch.bincount(index, minlength=7) / len(t)
    assert (share - 1 / 7).abs().max() < 5 * (1 / 7 / len(t)) ** 0.5


def test_a_law_on_the_grid_is_icts_discretised_log_normal() -> None:
    """Probability of an interval: the law's mass in it, the tails in the outermost ones (arXiv:2310.14189, eq. 10)."""
    t, r = GridPairs(karras, ConstantSteps(9), LogNormal(-1.1, 2.0))(rng(), EDM20)
    times = karras(EDM20, 9)
    cumulative = [0.5 * (1 + math.erf((math.log(time) + 1.1) / (2.0 * 2**0.5))) for time in times]
    cumulative[0], cumulative[-1] = 1.0, 0.0
    for high, low, upper, lower in zip(times, times[1:], cumulative, cumulative[1:], strict=False):
        share = float(((t == high) & (r == low)).double().mean())
        expected = upper - lower
        assert abs(share - expected) < 5 * (expected / len(t)) ** 0.5 + 1e-4, (high, low)


def test_the_number_of_intervals_doubles_on_a_timer() -> None:
    steps = DoublingSteps(first=10, last=160, total_steps=1000)
    assert [steps(step) for step in (0, 199, 200, 400, 600, 800, 999, 5000)] == [10, 10, 20, 40, 80, 160, 160, 160]
    assert DoublingSteps(10, 1280, 400_000)(399_999) == 1280
    assert DoublingSteps(10, 50, 300)(299) == 40  # floor(log2(50 / 10)) doublings are left


def test_the_curriculum_follows_the_step_of_the_draw() -> None:
    pairs = GridPairs(karras, DoublingSteps(2, 8, 30), None)
    assert [len(set(pairs(rng(step, 500), EDM20)[0].tolist())) for step in (0, 10, 20)] == [2, 4, 8]


@pytest.mark.parametrize("process", [EDM20, Trig(0.01, 1.55, 0.5), RectifiedFlow()], ids=["edm", "trig", "rf"])
@pytest.mark.parametrize("step", [0, 40, 99])
def test_easy_pairs_lie_in_order_within_the_range(process: object, step: int) -> None:
    law = UniformTime() if isinstance(process, RectifiedFlow) else LogNormal(-1.1, 2.0)
    t, r = EasyPairs(law, 2.0, 8, 100, 8.0, 1.0)(rng(step), process)  # type: ignore[arg-type]
    assert (r < t).all()
    assert (r >= process.t_min).all()  # type: ignore[attr-defined]
    assert (t <= process.t_max).all()  # type: ignore[attr-defined]
    order = t.argsort()
    assert (r[order].diff() >= -1e-12).all()  # r rises with t


def test_easy_pairs_have_the_papers_ratio_and_close_up_stage_by_stage() -> None:
    for stage in range(8):
        step = math.ceil(stage * 100 / 8)
        t, r = EasyPairs(LogNormal(-1.1, 2.0), 2.0, 8, 100, 8.0, 1.0)(rng(step, 2000), EDM20)
        ratio = 1 - 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-t))
        inside = (t > 0.05) & (t * ratio > 0.002)
        expected = ratio.clamp(max=0.999)
        assert torch.allclose((r / t)[inside], expected[inside], rtol=1e-6)
    assert (1 - r / t).max() < 0.5  # near the end pairs are close


def test_the_first_stage_is_near_denoising() -> None:
    t, r = EasyPairs(LogNormal(-1.1, 2.0), 2.0, 8, 100, 8.0, 1.0)(rng(), EDM20)
    assert (r[t < 1.5] == EDM20.t_min).all()


def test_the_weight_of_a_gap_is_taken_before_times_are_rounded() -> None:
    t = torch.tensor([5.0, 1.0], dtype=torch.float64)
    r = t * (1 - 1e-9)
    assert torch.allclose(inverse_gap(t, r, EDM20), 1e9 / t, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantSteps(0),
        lambda: DoublingSteps(0, 4, 10),
        lambda: DoublingSteps(8, 4, 10),
        lambda: DoublingSteps(2, 4, 0),
        lambda: EasyPairs(LogNormal(0, 1), 1.0, 8, 100, 8.0, 1.0),
        lambda: EasyPairs(LogNormal(0, 1), 2.0, 0, 100, 8.0, 1.0),
        lambda: EasyPairs(LogNormal(0, 1), 2.0, 8, 100, -1.0, 1.0),
        lambda: EasyPairs(LogNormal(0, 1), 2.0, 8, 100, 8.0, 0.0),
    ],
)
def test_values_outside_their_range_are_refused(make: object) -> None:
    with pytest.raises(UserError):
        make()  # type: ignore[operator]


def test_a_uniform_grid_serves_as_well() -> None:
    t, r = GridPairs(uniform, ConstantSteps(4), None)(rng(0, 100), RectifiedFlow())
    assert torch.allclose(t - r, torch.full_like(t, 0.25))
