"""times: the laws of training times."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from diffdistill import UserError
from diffdistill.process import EDM, VP, RectifiedFlow, Trig
from diffdistill.rng import Rng
from diffdistill.solvers import karras
from diffdistill.times import KarrasIndex, LogNormal, UniformTime

N = 20_000
WIDE = EDM(1e-6, 1e6)


def draw(law, process, dtype=torch.float64, seed=0):
    return law(Rng(seed, 0, "t", range(N)), process, dtype)


def test_log_normal_levels_have_its_mean_and_standard_deviation():
    level = draw(LogNormal(-0.8, 1.2), WIDE).log().numpy()
    assert abs(level.mean() + 0.8) < 4 * 1.2 / math.sqrt(N)
    assert abs(level.std() - 1.2) < 4 * 1.2 / math.sqrt(2 * N)
    assert stats.kstest(level, "norm", args=(-0.8, 1.2)).pvalue > 1e-3


@pytest.mark.parametrize("process", [VP(), RectifiedFlow(), Trig(sigma_data=0.5)])
def test_log_normal_is_a_law_of_the_noise_to_signal_ratio_in_every_process(process):
    t = draw(LogNormal(-0.8, 1.2), process)
    inside = (t > process.t_min) & (t < process.t_max)
    assert inside.double().mean() > 0.99
    level = process.angle(t).tan()
    torch.testing.assert_close(level[inside], draw(LogNormal(-0.8, 1.2), WIDE)[inside], rtol=1e-6, atol=0)


def test_log_normal_stays_within_the_range_of_the_process():
    t = draw(LogNormal(0.0, 3.0), EDM(0.1, 5.0), torch.float32)
    assert t.dtype == torch.float32
    assert t.min() == torch.tensor(0.1)
    assert t.max() == 5.0


def test_uniform_times_fill_their_share_of_the_range_evenly():
    t = draw(UniformTime(0.02, 0.98), VP())
    assert stats.kstest(t.numpy(), "uniform", args=(0.02 * 999, 0.96 * 999)).pvalue > 1e-3
    whole = draw(UniformTime(), EDM(1.0, 3.0))
    assert stats.kstest(whole.numpy(), "uniform", args=(1.0, 2.0)).pvalue > 1e-3


def test_karras_index_draws_levels_of_the_grid_within_its_share_evenly():
    law, process = KarrasIndex(0.02, 0.98, num_times=100), EDM(0.002, 80.0)
    grid = torch.tensor(karras(process, 99)[::-1], dtype=torch.float64)
    t = draw(law, process)
    index = torch.searchsorted(grid, t * (1 - 1e-9))
    torch.testing.assert_close(grid[index], t, rtol=1e-12, atol=0)
    counts = torch.bincount(index, minlength=100)
    assert counts.nonzero().flatten().tolist() == list(range(2, 98))
    assert stats.chisquare(counts[2:98].numpy()).pvalue > 1e-3


def test_karras_index_over_all_levels_reaches_both_ends():
    t = draw(KarrasIndex(num_times=10), EDM(0.002, 80.0), torch.float32)
    assert t.min() == torch.tensor(0.002)
    assert t.max() == 80.0
    assert len(t.unique()) == 10


@pytest.mark.parametrize("law", [LogNormal(0.0, 1.0), UniformTime(), KarrasIndex()])
def test_equal_seeds_give_equal_times_and_others_do_not(law):
    first = draw(law, EDM())
    assert torch.equal(first, draw(law, EDM()))
    assert (first != draw(law, EDM(), seed=1)).double().mean() > 0.9


def test_impossible_laws_are_refused():
    with pytest.raises(UserError, match="std must be > 0, got 0"):
        LogNormal(0.0, 0)
    for low, high in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(UserError, match="must satisfy 0 <= low < high <= 1"):
            UniformTime(low, high)
        with pytest.raises(UserError, match="must satisfy 0 <= low < high <= 1"):
            KarrasIndex(low, high)
    with pytest.raises(UserError, match="num_times must lie in 2..1000000, got 1"):
        KarrasIndex(num_times=1)
