"""ema: moving averages at constant and power rates."""

from __future__ import annotations

import pytest
import torch

from diffdistill import UserError
from diffdistill.networks.ema import Constant, Ema, Power


def run(rate, values):
    """The average after each of `values`, starting from 0."""
    source = torch.zeros(1, dtype=torch.float64)
    average, seen = Ema([source], rate), []
    for value in values:
        source.fill_(value)
        average.update()
        seen.append(float(average.average[0]))
    return seen


def test_a_constant_average_keeps_its_decay_of_the_old_value():
    got = run(Constant(0.9), [1.0, 2.0, -1.0])
    wanted = [0.1, 0.9 * 0.1 + 0.1 * 2, 0.9 * (0.9 * 0.1 + 0.1 * 2) - 0.1]
    assert got == pytest.approx(wanted)


def test_a_power_average_weights_update_k_like_its_gamma_th_power():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for gamma in (1.0, 6.94):
        k = torch.arange(1, 201, dtype=torch.float64)
        # the product of (1 - 1/j)^(gamma + 1) over j > k telescopes to (k/n)^(gamma + 1)
        weights = (k / 200) ** (gamma + 1) - ((k - 1) / 200) ** (gamma + 1)
        assert run(Power(gamma), values.tolist())[-1] == pytest.approx(float((weights * values).sum()), rel=1e-9)


def test_a_power_average_with_gamma_near_zero_is_the_uniform_mean():
    values = [3.0, -1.0, 4.0, 1.0, 5.0]
    assert run(Power(1e-9), values)[-1] == pytest.approx(sum(values) / 5)


def test_a_power_average_forgets_where_it_started_at_once():
    assert run(Power(6.94), [7.0])[0] == 7.0


def test_the_average_starts_as_a_copy_of_its_source():
    source, given = [torch.ones(2), torch.zeros(3)], [torch.full((2,), 9.0), torch.full((3,), 9.0)]
    own = Ema(source, Constant(0.5))
    assert all(torch.equal(a, s) for a, s in zip(own.average, source, strict=True))
    assert own.average[0].data_ptr() != source[0].data_ptr()
    Ema(source, Constant(0.5), given)
    assert all(torch.equal(a, s) for a, s in zip(given, source, strict=True))


def test_swapped_shows_the_average_and_restores_the_source_even_after_an_error():
    source = torch.zeros(2, requires_grad=True)
    average = Ema([source], Constant(0.75))
    with torch.no_grad():
        source.fill_(4.0)
    average.update()

    def broken():
        with average.swapped():
            assert torch.equal(source.detach(), torch.ones(2))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        broken()
    assert torch.equal(source.detach(), torch.full((2,), 4.0))
    assert torch.equal(average.average[0], torch.ones(2))


def test_restart_begins_again_from_the_source():
    source = torch.zeros(1)
    average = Ema([source], Power(6.94))
    for value in (1.0, 2.0):
        source.fill_(value)
        average.update()
    source.fill_(5.0)
    average.restart()
    assert (average.updates, float(average.average[0])) == (0, 5.0)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_impossible_rates_are_refused(decay):
    with pytest.raises(UserError, match=r"decay must lie in \[0, 1\)"):
        Constant(decay)
    with pytest.raises(UserError, match="gamma must be > 0"):
        Power(0.0)
