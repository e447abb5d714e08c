"""solvers: measured orders on the Gaussian's closed PF-ODE map, grids against their formulas, counted calls."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from diffdistill import UserError
from diffdistill.denoiser import Denoiser, Guidance
from diffdistill.networks.call import recorded_passes
from diffdistill.networks.exact import Gaussian, Mixture, circle
from diffdistill.process import EDM, VP, X0, RectifiedFlow, Trig
from diffdistill.rng import Rng
from diffdistill.solvers import (
    DPMpp2M,
    ddim,
    euler,
    heun,
    heun_to_end,
    karras,
    karras_few,
    logit_normal,
    ode_sampler,
    sample,
    trailing,
    uniform,
)

# narrow enough that a few dozen steps are in the asymptotic regime
PROCESSES = {
    "edm": EDM(0.3, 4.0),
    "vp": VP(100.0, 700.0),
    "rf": RectifiedFlow(0.2, 0.9),
    "trig": Trig(0.3, 1.4, sigma_data=0.5),
}
MEAN, STD = [[0.7, -0.2]], [[1.3, 0.4]]
processes = pytest.mark.parametrize("name", PROCESSES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(process):
    return Denoiser(Gaussian(process, MEAN, STD))


def exact(process, z):
    """Where the PF-ODE of the Gaussian takes sigma(t_max) z at t_min."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = process.alpha_sigma(ends)
    ratio = torch.sqrt((alpha_s * std) ** 2 + sigma_s**2) / torch.sqrt((alpha_t * std) ** 2 + sigma_t**2)
    return alpha_s * mean + (sigma_t * z - alpha_t * mean) * ratio


def error(name, solver, num_steps):
    """Mean distance to the exact end over the process's range."""
    process, z = PROCESSES[name], randn(16, 2)
    end = sample(gaussian(process), solver, uniform(process, num_steps), z, {})
    return float((end - exact(process, z)).abs().mean())


def order(name, solver):
    """log2 of how far the error falls when the steps halve."""
    return math.log2(error(name, solver, 32) / error(name, solver, 64))


@processes
@pytest.mark.parametrize("solver", [ddim, euler])
def test_ddim_and_euler_are_first_order_on_the_gaussian(name, solver):
    assert order(name, solver) == pytest.approx(1, abs=0.15)


@processes
@pytest.mark.parametrize("solver", [heun, DPMpp2M()], ids=["heun", "dpmpp_2m"])
def test_heun_and_dpmpp_2m_are_second_order_on_the_gaussian(name, solver):
    assert order(name, solver) == pytest.approx(2, abs=0.25)
    assert error(name, solver, 64) < error(name, ddim, 64) / 5


@processes
def test_all_steps_in_one_grid_position_are_solver_steps(name):
    """One step over [t, s] by hand: DDIM holds x0, Euler the velocity, Heun averages it."""
    process, x = PROCESSES[name], randn(3, 2)
    view = gaussian(process)
    t, s = (torch.full((3,), v, dtype=torch.float64) for v in (process.t_max, process.t_min))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    d = view(x, t, {})
    eps = (x - alpha_t[:, None] * d) / sigma_t[:, None]
    torch.testing.assert_close(ddim(view, x, t, s, {}), alpha_s[:, None] * d + sigma_s[:, None] * eps)

    def velocity(x, t):
        alpha, sigma = process.alpha_sigma(t)
        rate_alpha, rate_sigma = process.rates(t)
        d = view(x, t, {})
        return rate_alpha[:, None] * d + rate_sigma[:, None] * (x - alpha[:, None] * d) / sigma[:, None]

    step = (s - t)[:, None]
    landed = x + step * velocity(x, t)
    torch.testing.assert_close(euler(view, x, t, s, {}), landed)
    torch.testing.assert_close(heun(view, x, t, s, {}), x + step / 2 * (velocity(x, t) + velocity(landed, s)))


class PointMass(nn.Module):
    """The denoiser of data at one point."""

    kind, null, closed_form, blocks = X0, None, True, ()

    def __init__(self, process, point):
        super().__init__()
        self.process, self.point = process, point

    def scale(self, t):
        return torch.ones_like(t)

    def time(self, t):
        return t

    def forward(self, x, t_net, cond):
        return self.point.expand_as(x)


@processes
@pytest.mark.parametrize("num_steps", [1, 3])
def test_ddim_and_dpmpp_2m_are_exact_for_a_point_mass(name, num_steps):
    process, z = PROCESSES[name], randn(4, 2)
    point = torch.tensor([1.5, -0.7], dtype=torch.float64)
    times = uniform(process, num_steps)
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = process.alpha_sigma(ends)
    eps = (sigma_t * z - alpha_t * point) / sigma_t
    for solver in (ddim, DPMpp2M()):
        end = sample(Denoiser(PointMass(process, point)), solver, times, z, {})
        torch.testing.assert_close(end, alpha_s * point + sigma_s * eps)


@pytest.mark.parametrize("name", ["edm", "rf"])
def test_euler_is_ddim_where_alpha_and_sigma_are_linear_in_t(name):
    process, x = PROCESSES[name], randn(3, 2)
    t, s = (torch.full((3,), v, dtype=torch.float64) for v in (process.t_max, process.t_min))
    torch.testing.assert_close(euler(gaussian(process), x, t, s, {}), ddim(gaussian(process), x, t, s, {}))


@pytest.mark.parametrize("name", ["vp", "trig"])
def test_euler_is_not_ddim_elsewhere(name):
    process, x = PROCESSES[name], randn(3, 2)
    t, s = (torch.full((3,), v, dtype=torch.float64) for v in (process.t_max, process.t_min))
    gap = euler(gaussian(process), x, t, s, {}) - ddim(gaussian(process), x, t, s, {})
    assert gap.abs().max() > 0.01


def test_ddim_in_trigflow_is_a_rotation():
    process, x = Trig(0.0, math.pi / 2, sigma_data=0.5), randn(3, 2)
    view = gaussian(process)
    t, s = torch.full((3,), 1.2, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64)
    rate_alpha, rate_sigma = process.rates(t)
    alpha, sigma = process.alpha_sigma(t)
    d = view(x, t, {})
    drift = rate_alpha[:, None] * d + rate_sigma[:, None] * (x - alpha[:, None] * d) / sigma[:, None]
    torch.testing.assert_close(ddim(view, x, t, s, {}), math.cos(0.5) * x - math.sin(0.5) * drift)


@processes
@pytest.mark.parametrize("solver", [ddim, euler, heun])
def test_each_sample_moves_between_times_of_its_own(name, solver):
    process, x = PROCESSES[name], randn(3, 2)
    span = process.t_max - process.t_min
    t = process.t_min + span * torch.tensor([1.0, 0.7, 0.5], dtype=torch.float64)
    s = process.t_min + span * torch.tensor([0.2, 0.6, 0.0], dtype=torch.float64)
    together = solver(gaussian(process), x, t, s, {})
    for row in range(3):
        here = slice(row, row + 1)
        torch.testing.assert_close(solver(gaussian(process), x[here], t[here], s[here], {}), together[here])


def test_dpmpp_2m_starts_every_trajectory_without_a_past():
    process, z, solver = PROCESSES["edm"], randn(4, 2), DPMpp2M()
    first = sample(gaussian(process), solver, uniform(process, 4), z, {})
    assert torch.equal(sample(gaussian(process), solver, uniform(process, 4), z, {}), first)
    assert solver.previous is None


@pytest.mark.parametrize("process", [RectifiedFlow(), Trig(sigma_data=0.5), VP(), EDM()])
@pytest.mark.parametrize("solver", [ddim, euler, heun, DPMpp2M()], ids=["ddim", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solvers_go_from_pure_noise_to_clean_data(process, solver, dtype):
    grid = karras if isinstance(process, EDM) else uniform
    end = sample(gaussian(process), solver, grid(process, 30), randn(4, 2).to(dtype), {})
    assert end.dtype == dtype
    assert (end - exact(process, randn(4, 2))).abs().max() < 0.3


@pytest.mark.parametrize("process", [RectifiedFlow(), Trig(sigma_data=0.5)])
def test_samples_of_the_whole_range_have_the_moments_of_the_data(process):
    z = randn(20_000, 2)
    end = sample(gaussian(process), heun, uniform(process, 40), z, {})
    mean, std = torch.tensor(MEAN[0], dtype=torch.float64), torch.tensor(STD[0], dtype=torch.float64)
    torch.testing.assert_close(end.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(end.std(0), std, rtol=0.02, atol=0)


# -- grids --------------------------------------------------------------------------------------------------------

WHOLE = {"edm": EDM(), "vp": VP(), "rf": RectifiedFlow(), "trig": Trig()}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("grid", [uniform, logit_normal, trailing, karras])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_grids_have_one_time_more_than_steps_and_decrease_to_t_min(name, grid, num_steps):
    process = WHOLE[name]
    if grid is karras and name in ("rf", "trig"):
        with pytest.raises(UserError, match="grid karras needs finite noise-to-signal ratios"):
            grid(process, num_steps)
        return
    times = grid(process, num_steps)
    assert len(times) == num_steps + 1
    assert all(a > b for a, b in itertools.pairwise(times))
    assert times[-1] == process.t_min
    assert times[0] == process.t_max


def test_karras_is_the_formula_of_edm():
    n, rho = 18, 7
    i = np.arange(n)
    wanted = (80.0 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho
    np.testing.assert_allclose(karras(EDM(0.002, 80.0), n - 1), wanted, rtol=1e-9)
    other = (80.0 ** (1 / 3) + i / (n - 1) * (0.002 ** (1 / 3) - 80.0 ** (1 / 3))) ** 3
    np.testing.assert_allclose(karras(EDM(0.002, 80.0), n - 1, rho=3), other, rtol=1e-9)


def test_karras_has_the_same_noise_to_signal_ratios_in_every_process():
    process = VP().clipped_to(EDM(0.02, 80.0))
    levels = process.angle(torch.tensor(karras(process, 10), dtype=torch.float64)).tan()
    ends = levels[0].item(), levels[-1].item()
    np.testing.assert_allclose(levels.numpy(), karras(EDM(ends[1], ends[0]), 10), rtol=1e-6)


def test_uniform_steps_are_equal():
    np.testing.assert_allclose(np.diff(uniform(RectifiedFlow(), 8)), -1 / 8, rtol=1e-12)


def test_logit_normal_times_are_the_quantiles_of_the_law():
    times = np.array(logit_normal(RectifiedFlow(), 4, mean=0.5, std=2.0)[1:-1])
    logits = np.log(times / (1 - times))
    np.testing.assert_allclose(logits, 0.5 + 2 * np.array([0.6744897501960817, 0.0, -0.6744897501960817]), rtol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 4, 18, 50, 999])
def test_trailing_on_ddpms_index_gives_the_integers_of_diffusers(num_steps):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    stock.set_timesteps(num_steps)
    assert list(trailing(VP(), num_steps)[:-1]) == stock.timesteps.tolist()


# -- counted calls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "num_steps", "calls"), [(ddim, 5, 5), (euler, 5, 5), (heun, 18, 35), (heun, 1, 1), (DPMpp2M(), 5, 5)]
)
@pytest.mark.parametrize("guided", [False, True])
def test_nfe_is_the_counted_number_of_network_calls(solver, num_steps, calls, guided):
    network = Mixture(EDM(), circle(4), 0.3)
    view = Denoiser(network).guided(Guidance(2.0, network.null)) if guided else Denoiser(network)
    sampler = ode_sampler(view, solver, karras, num_steps)
    with recorded_passes() as passes:
        sampler.sample(randn(2, 2), {"label": torch.tensor([0, 3])}, Rng(0, 0, "s", range(2)))
    assert sampler.nfe == len(passes) == calls * (2 if guided else 1)


def test_a_sampler_with_other_steps_keeps_solver_grid_and_denoiser():
    sampler = ode_sampler(gaussian(EDM()), heun, karras, 18).with_steps(4)
    assert (sampler.solver, sampler.grid, sampler.times) == (heun, karras, karras(EDM(), 4))
    assert sampler.nfe == 7


def test_the_last_step_of_heun_is_a_ddim_step():
    process, z = EDM(), randn(4, 2)
    times = karras(process, 3)
    view = gaussian(process)
    before = sample(view, heun, (*times[:-1], times[-2] * 0.999), z, {})  # its last step is DDIM's too, and short
    x = times[0] * z
    full = [torch.full((4,), t, dtype=torch.float64) for t in times]
    for t, s in itertools.pairwise(full[:-1]):
        x = heun(view, x, t, s, {})
    assert torch.equal(sample(view, heun, times, z, {}), ddim(view, x, full[-2], full[-1], {}))
    torch.testing.assert_close(before, x, rtol=1e-2, atol=1e-3)


def test_sampling_keeps_no_graph_but_sample_lets_gradients_through():
    network = Gaussian(EDM(), MEAN, STD, trainable=True)
    sampler = ode_sampler(Denoiser(network), heun, karras, 3)
    assert not sampler.sample(randn(2, 2), {}, Rng(0)).requires_grad
    sample(Denoiser(network), heun, sampler.times, randn(2, 2), {}).sum().backward()
    assert network.mean.grad.abs().min() > 0


def test_a_sampler_without_steps_is_refused():
    with pytest.raises(UserError, match="sampler.num_steps must lie in 1..10000, got 0"):
        ode_sampler(gaussian(EDM()), heun, karras, 0)


def test_heun_to_end_is_heun_but_ddim_where_it_ends_also_for_kinds_that_are_singular_there():
    """BoundaryF has no velocity at t_min: plain Heun gives nan there (Song et al. 2023, appendix C)."""
    network = Gaussian(EDM(0.002, 20.0), [[0.7]], [[1.3]], form="flow_map_f")
    denoiser = Denoiser(network)
    x, t = torch.tensor([[3.0], [0.4], [1.0]], dtype=torch.float64), torch.tensor([5.0, 0.1, 2.0], dtype=torch.float64)
    s = torch.tensor([2.0, 0.002, 0.002], dtype=torch.float64)
    got = heun_to_end(denoiser, x, t, s, {})
    assert torch.allclose(got[:1], heun(denoiser, x[:1], t[:1], s[:1], {}), rtol=1e-12)
    assert torch.allclose(got[1:], ddim(denoiser, x[1:], t[1:], s[1:], {}), rtol=1e-12)
    assert not heun(denoiser, x[1:], t[1:], s[1:], {}).isfinite().all()


def test_a_few_steps_lie_on_the_levels_of_the_karras_grid():
    process = EDM(0.002, 80.0)
    levels = karras(process, 39)
    assert karras_few(process, 1, 24) == (80.0,)
    assert karras_few(process, 2, 24) == (levels[0], levels[24])
    assert karras_few(process, 4, 24) == tuple(levels[index] for index in (0, 8, 16, 24))
    assert karras_few(process, 2, 24)[1] == pytest.approx(0.821, abs=0.003)  # the second step of the papers
    for wrong in (0, 26):
        with pytest.raises(UserError, match="steps must lie in"):
            karras_few(process, wrong, 24)
    with pytest.raises(UserError, match="last must lie in"):
        karras_few(process, 2, 39)
