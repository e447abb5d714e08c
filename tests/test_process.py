"""process: kinds, conversions, change of process and re-noising against direct computation from (x0, eps)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from diffdistill import UserError
from diffdistill.autodiff import jvp
from diffdistill.process import (
    EDM,
    EPS,
    SCORE,
    VELOCITY,
    VP,
    X0,
    BoundaryF,
    F,
    NoiseProcess,
    RectifiedFlow,
    Trig,
    V,
    expand,
)

PROCESSES = {
    "edm": EDM(0.002, 80.0),
    "vp": VP(),
    "vp_scaled": VP(beta_start=0.00085, beta_end=0.012, schedule="scaled_linear"),
    "rf": RectifiedFlow(),
    "trig": Trig(sigma_data=0.5),
}
KINDS = {
    "x0": X0,
    "eps": EPS,
    "v": V,
    "velocity": VELOCITY,
    "score": SCORE,
    "f": F(0.5),
    "boundary_f": BoundaryF(0.5, 0.002),
}
INTERIOR = {
    "edm": [0.05, 0.5, 2.0, 20.0],
    "vp": [20.0, 250.5, 600.0, 900.3],
    "vp_scaled": [20.0, 250.5, 600.0, 900.3],
    "rf": [0.05, 0.3, 0.6, 0.9],
    "trig": [0.05, 0.5, 1.0, 1.5],
}
processes = pytest.mark.parametrize("name", PROCESSES)


def state(name, dtype=torch.float64, shape=(3,)):
    """A batch at the interior times of a process, with the x0 and eps it was made from."""
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor(INTERIOR[name], dtype=dtype)
    x0 = 0.5 * torch.randn(len(t), *shape, generator=generator, dtype=torch.float64).to(dtype)
    eps = torch.randn(len(t), *shape, generator=generator, dtype=torch.float64).to(dtype)
    return t, x0, eps, PROCESSES[name].add_noise(x0, eps, t)


def direct(kind, process, x0, eps, t):
    """The prediction written down from x0 and eps by its definition."""
    alpha, sigma = (expand(value, x0) for value in process.alpha_sigma(t))
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "velocity":
        h = 1e-5 * (process.t_max - process.t_min)
        return (process.add_noise(x0, eps, t + h) - process.add_noise(x0, eps, t - h)) / (2 * h)
    if kind == "score":
        return -eps / sigma
    x = alpha * x0 + sigma * eps
    level, x_unit = sigma / alpha, x / alpha
    if kind == "f":  # EDM's preconditioning, written for the state x / alpha at level sigma / alpha
        c_skip, c_out = 0.25 / (level**2 + 0.25), level * 0.5 / (level**2 + 0.25).sqrt()
    else:  # the scalings of consistency models
        c_skip = 0.25 / ((level - 0.002) ** 2 + 0.25)
        c_out = (level - 0.002) * 0.5 / (level**2 + 0.25).sqrt()
    return (x0 - c_skip * x_unit) / c_out


@processes
@pytest.mark.parametrize("kind", KINDS)
def test_converting_from_x0_gives_the_prediction_computed_from_x0_and_eps(name, kind):
    t, x0, eps, x_t = state(name)
    process = PROCESSES[name]
    got = process.convert(x0, x_t, t, X0, KINDS[kind])
    torch.testing.assert_close(got, direct(kind, process, x0, eps, t), rtol=1e-6, atol=1e-6)


@processes
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_conversions_invert_for_every_pair_of_kinds(name, source, target, dtype, tolerance):
    t, x0, eps, x_t = state(name, dtype)
    process = PROCESSES[name]
    pred = process.convert(x0, x_t, t, X0, KINDS[source])
    other = process.convert(pred, x_t, t, KINDS[source], KINDS[target])
    back = process.convert(other, x_t, t, KINDS[target], KINDS[source])
    torch.testing.assert_close(other, process.convert(x0, x_t, t, X0, KINDS[target]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(back, pred, rtol=tolerance, atol=tolerance)
    assert back.dtype == dtype


@pytest.mark.parametrize("source", KINDS)
def test_conversion_of_bfloat16_predictions_runs_in_float32(source):
    t, x0, _, x_t = state("edm", torch.float32)
    exact = PROCESSES["edm"].convert(x0.bfloat16().float(), x_t.bfloat16().float(), t, KINDS[source], VELOCITY)
    got = PROCESSES["edm"].convert(x0.bfloat16(), x_t.bfloat16(), t, KINDS[source], VELOCITY)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0, atol=0)


@processes
def test_images_broadcast_like_vectors(name):
    t, x0, _, x_t = state(name, shape=(2, 4, 4))
    process = PROCESSES[name]
    image = process.convert(x0, x_t, t, X0, EPS)
    vector = process.convert(x0.flatten(1), x_t.flatten(1), t, X0, EPS)
    torch.testing.assert_close(image.flatten(1), vector, rtol=0, atol=0)


def test_per_sample_values_of_another_batch_size_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \[3\], got \(2,\)"):
        EDM().add_noise(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"must have shape \[3\], got \(\)"):
        EDM().add_noise(torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor(1.0))


# -- rates and angles ---------------------------------------------------------------------------------------------


@processes
def test_rates_equal_central_differences(name):
    process, t = PROCESSES[name], torch.tensor(INTERIOR[name], dtype=torch.float64)
    h = 1e-5 * (process.t_max - process.t_min)
    for rate, high, low in zip(process.rates(t), process.alpha_sigma(t + h), process.alpha_sigma(t - h), strict=True):
        torch.testing.assert_close(rate, (high - low) / (2 * h), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("ends", [(0.0, 999.0), (3.3, 900.7)])
def test_vp_in_closed_form_is_what_autodiff_and_bisection_give(shift, zero, ends):
    process = VP(*ends, 0.00085, 0.012, "scaled_linear", zero_terminal_snr=zero, snr_shift=shift)
    t = torch.linspace(*ends, 2001, dtype=torch.float64)
    for ours, wanted in zip(process.rates(t), NoiseProcess.rates(process, t), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(process._near(process.angle(t)), t, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(NoiseProcess._near(process, process.angle(t)), t, rtol=1e-11, atol=1e-11)


def test_rates_of_the_closed_processes_are_the_textbook_ones():
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    expected = {
        EDM(): (zero, one),
        RectifiedFlow(): (-one, one),
        Trig(sigma_data=0.5): (-torch.sin(t), 0.5 * torch.cos(t)),
    }
    for process, rates in expected.items():
        for got, wanted in zip(process.rates(t), rates, strict=True):
            torch.testing.assert_close(got, wanted)


@processes
def test_time_at_inverts_the_angle_inside_and_at_both_ends(name):
    process = PROCESSES[name]
    t = torch.tensor([process.t_min, *INTERIOR[name], process.t_max], dtype=torch.float64)
    torch.testing.assert_close(process.time_at(process.angle(t)), t, rtol=1e-9, atol=1e-9)


@processes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_beyond_the_range_give_its_ends(name, dtype):
    process = PROCESSES[name]
    beyond = torch.tensor([-0.1, math.pi / 2, math.pi / 2 + 1e-6], dtype=dtype)
    ends = torch.tensor([process.t_min, process.t_max, process.t_max], dtype=dtype)
    torch.testing.assert_close(process.time_at(beyond), ends, rtol=1e-6, atol=0)
    assert process.time_at(beyond).amax() <= ends[1]


@processes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_at_carries_its_derivative_at_the_ends_of_the_range(name, dtype):
    # a rounded angle lies now inside, now beyond: many ranges try both
    for share in torch.linspace(0.3, 1, 15).tolist():
        whole = PROCESSES[name]
        process = replace(whole, t_min=0.01 * share * whole.t_max, t_max=0.95 * share * whole.t_max)
        t = torch.tensor([process.t_min, process.t_max], dtype=dtype)
        phi, slope = jvp(process.angle, (t,), (torch.ones_like(t),))
        back = jvp(process.time_at, (phi,), (torch.ones_like(phi),))[1]
        torch.testing.assert_close(back, 1 / slope, rtol=1e-3, atol=0)


@processes
def test_time_at_carries_the_derivative_of_the_inverse(name):
    process = PROCESSES[name]
    t = torch.tensor(INTERIOR[name], dtype=torch.float64)
    phi, slope = jvp(process.angle, (t,), (torch.ones_like(t),))
    back, inverse_slope = jvp(process.time_at, (phi,), (torch.ones_like(phi),))
    torch.testing.assert_close(back, t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_slope, 1 / slope, rtol=1e-6, atol=0)


@processes
def test_time_at_in_float32_is_the_float64_time(name):
    process = PROCESSES[name]
    t = torch.tensor(INTERIOR[name], dtype=torch.float64)
    torch.testing.assert_close(process.time_at(process.angle(t).float()).double(), t, rtol=1e-4, atol=1e-5)


def test_vp_at_integers_equals_the_alpha_bar_of_diffusers():
    from diffusers import DDPMScheduler

    for name, schedule in (("vp", "linear"), ("vp_scaled", "scaled_linear")):
        process = PROCESSES[name]
        stock = DDPMScheduler(
            beta_start=process.beta_start, beta_end=process.beta_end, beta_schedule=schedule, num_train_timesteps=1000
        )
        alpha, sigma = process.alpha_sigma(torch.arange(1000, dtype=torch.float64))
        torch.testing.assert_close(alpha.square(), stock.alphas_cumprod.double(), rtol=2e-5, atol=0)
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000, dtype=torch.float64))
        betas = torch.linspace(process.beta_start**0.5, process.beta_end**0.5, 1000, dtype=torch.float64) ** 2
        if schedule == "scaled_linear":
            torch.testing.assert_close(alpha.square(), torch.cumprod(1 - betas, 0), rtol=1e-12, atol=0)


def test_vp_has_a_continuous_derivative_across_its_integers():
    process, t = VP(), torch.tensor([1.0, 300.0, 998.0], dtype=torch.float64)
    for before, after in zip(process.rates(t - 1e-9), process.rates(t + 1e-9), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-12)


# -- noise and jumps ----------------------------------------------------------------------------------------------


@processes
def test_diffuse_scales_the_mean_and_adds_the_missing_variance(name):
    process = PROCESSES[name]
    s = torch.tensor(INTERIOR[name][:-1], dtype=torch.float64)
    t = torch.tensor(INTERIOR[name][1:], dtype=torch.float64)
    one, zero = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    alpha_s, sigma_s = process.alpha_sigma(s)
    alpha_t, sigma_t = process.alpha_sigma(t)
    gain, spread = process.diffuse(one, s, t, zero)[:, 0], process.diffuse(zero, s, t, one)[:, 0]
    torch.testing.assert_close(gain, alpha_t / alpha_s)
    # x_s = alpha_s x0 + sigma_s eps diffused to t has the law of add_noise at t
    torch.testing.assert_close(gain * alpha_s, alpha_t)
    torch.testing.assert_close((gain * sigma_s).square() + spread.square(), sigma_t.square())


@processes
def test_diffusing_to_the_same_time_adds_nothing(name):
    t, _, eps, x_t = state(name, torch.float32)
    torch.testing.assert_close(PROCESSES[name].diffuse(x_t, t, t, eps), x_t, rtol=0, atol=0)


@processes
def test_jump_to_the_same_time_is_the_identity(name):
    t, x0, _, x_t = state(name, torch.float32)
    torch.testing.assert_close(PROCESSES[name].jump(x_t, x0, t, t), x_t, rtol=0, atol=0)


@processes
def test_jump_at_t_min_to_itself_is_the_identity(name):
    process = PROCESSES[name]
    t = torch.full((2,), process.t_min)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(process.jump(x, torch.ones(2, 3), t, t), x, rtol=0, atol=0)


@processes
def test_jump_lands_where_the_same_x0_and_eps_lie(name):
    t, x0, eps, x_t = state(name)
    process = PROCESSES[name]
    for s in (torch.full_like(t, process.t_min), t / 2, t.flip(0)):
        torch.testing.assert_close(process.jump(x_t, x0, t, s), process.add_noise(x0, eps, s), rtol=1e-9, atol=1e-9)


# -- boundary scalings --------------------------------------------------------------------------------------------


def test_f_has_finite_scalings_where_sigma_is_zero():
    c_x, c_pred = F(0.5).x0_from(RectifiedFlow(), torch.zeros(1))
    assert (c_x.item(), c_pred.item()) == (1.0, 0.0)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RectifiedFlow().convert(torch.ones(2, 3), x, torch.zeros(2), F(0.5), X0), x)


@processes
def test_f_scalings_solve_the_row_and_stay_accurate_in_float32_at_small_noise(name):
    process, kind = PROCESSES[name], F(0.5)
    start = process.t_min + 1e-5 * (process.t_max - process.t_min)
    exact = kind.x0_from(process, torch.tensor([start], dtype=torch.float64))
    alpha, sigma = process.alpha_sigma(torch.tensor([start], dtype=torch.float64))
    torch.testing.assert_close(exact[1], sigma * 0.5 / (alpha**2 * 0.25 + sigma**2).sqrt(), rtol=1e-12, atol=0)
    for single, double in zip(kind.x0_from(process, torch.tensor([start])), exact, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=2e-3 if "vp" in name else 1e-4, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_boundary_f_has_the_scalings_of_diffusers_consistency_scheduler(sigma_data):
    from diffusers import CMStochasticIterativeScheduler

    stock = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=20.0, sigma_data=sigma_data)
    t = torch.tensor([0.002, 0.003, 0.1, 1.0, 20.0])
    ours = BoundaryF(sigma_data, 0.002).x0_from(EDM(0.002, 20.0), t)
    for got, wanted in zip(ours, stock.get_scalings_for_boundary_condition(t), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_boundary_f_returns_its_input_bit_for_bit_at_t_min(dtype, sigma_data):
    generator = torch.Generator().manual_seed(0)
    x, raw = torch.randn(2, 64, 3, generator=generator, dtype=dtype)
    t = torch.full((64,), 0.002, dtype=dtype)
    assert torch.equal(EDM(0.002, 20.0).convert(raw, x, t, BoundaryF(sigma_data, 0.002), X0), x)


# -- change of process --------------------------------------------------------------------------------------------


@processes
@pytest.mark.parametrize("other", PROCESSES)
def test_match_finds_the_same_x0_and_eps_up_to_scale(name, other):
    t, x0, eps, x_t = state(name)
    source, target = PROCESSES[name], PROCESSES[other].clipped_to(PROCESSES[name])
    t_other, factor = source.match(target, t)
    inside = (t_other > target.t_min) & (t_other < target.t_max)
    assert inside.any()
    moved = expand(factor, x_t) * x_t
    torch.testing.assert_close(moved[inside], target.add_noise(x0, eps, t_other)[inside], rtol=1e-7, atol=1e-7)


def test_trig_time_of_rectified_flow_is_the_signal_to_noise_match_of_unscaled_data():
    t = torch.tensor([0.2, 0.8, 1.4], dtype=torch.float64)
    tau, factor = Trig(sigma_data=0.5).match(RectifiedFlow(), t)
    expected = 0.5 * torch.sin(t) / (torch.cos(t) + 0.5 * torch.sin(t))
    torch.testing.assert_close(tau, expected)
    torch.testing.assert_close(factor, 1 / (torch.cos(t) + 0.5 * torch.sin(t)))


def test_clipped_to_covers_just_the_noise_levels_of_the_other():
    clipped = Trig(sigma_data=0.5).clipped_to(EDM(0.002, 80.0))
    assert clipped.t_min == pytest.approx(math.atan(0.002 / 0.5), rel=1e-12)
    assert clipped.t_max == pytest.approx(math.atan(80 / 0.5), rel=1e-12)
    assert EDM(0.01, 10.0).clipped_to(RectifiedFlow()) == EDM(0.01, 10.0)
    assert isinstance(VP().clipped_to(EDM(0.1, 5.0)), VP)


# -- ranges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [(), (0.002,), (81.0,), (1.0, 1.0), (0.5, 0.9), (5.0, float("nan"))])
def test_a_grid_outside_the_range_or_not_decreasing_is_refused(times):
    with pytest.raises(UserError, match=r"distiller.times must decrease within \(t_min, t_max\] = \(0.002, 80\]"):
        EDM().check_times("distiller.times", times)


def test_a_decreasing_grid_up_to_t_max_is_accepted():
    EDM().check_times("distiller.times", (80.0, 2.5, 0.003))


@pytest.mark.parametrize("ends", [(1.0, 1.0), (-0.1, 1.0), (0.0, float("inf"))])
def test_an_empty_or_infinite_time_range_is_refused(ends):
    with pytest.raises(UserError, match="must satisfy 0 <= t_min < t_max"):
        EDM(*ends)


def test_a_shifted_table_that_ends_without_signal_is_cogvideox_s() -> None:
    from diffusers import CogVideoXDDIMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    stock = CogVideoXDDIMScheduler(
        **betas, beta_schedule="scaled_linear", snr_shift_scale=3.0, rescale_betas_zero_snr=True
    )
    process = VP(**betas, schedule="scaled_linear", snr_shift=3.0, zero_terminal_snr=True)
    t = torch.tensor([0.0, 1.0, 250.0, 700.0, 998.0, 999.0], dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    assert torch.allclose(alpha.square(), stock.alphas_cumprod[t.long()].double(), atol=1e-6)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones_like(t)) and float(alpha[-1]) < 1e-12
    assert torch.allclose(process.time_at(process.angle(t)), t, atol=1e-4)
