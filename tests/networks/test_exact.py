"""exact: closed-form networks against quadrature and against one another."""

from __future__ import annotations

import math

import pytest
import torch

from diffdistill import UserError
from diffdistill.denoiser import Denoiser
from diffdistill.networks.exact import Gaussian, Mixture, circle, mixture_on_circle
from diffdistill.process import EDM, VELOCITY, VP, X0, BoundaryF, F, RectifiedFlow, Trig
from diffdistill.rng import Rng

PROCESSES = {"edm": EDM(), "vp": VP(), "rf": RectifiedFlow(), "trig": Trig(sigma_data=0.5)}
INTERIOR = {
    "edm": [0.05, 0.5, 2.0, 20.0],
    "vp": [20.0, 250.5, 600.0, 900.3],
    "rf": [0.05, 0.3, 0.6, 0.9],
    "trig": [0.05, 0.5, 1.0, 1.5],
}
processes = pytest.mark.parametrize("name", PROCESSES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior_mean(density, process, x_t, t):
    """E[x0 | x_t] in one dimension by quadrature over x0; density: of x0, unnormalised."""
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    likelihood = torch.exp(-((x_t - alpha[:, None] * grid) ** 2) / (2 * sigma[:, None] ** 2))
    weights = density(grid) * likelihood
    return (weights * grid).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def noised(process, x0, t):
    return process.add_noise(x0, randn(*x0.shape), t)


@processes
def test_the_gaussian_denoiser_is_the_posterior_mean(name):
    process, t = PROCESSES[name], torch.tensor(INTERIOR[name], dtype=torch.float64)
    x_t = noised(process, 0.7 + 1.3 * randn(4, 1, seed=1), t)
    wanted = posterior_mean(lambda x0: torch.exp(-((x0 - 0.7) ** 2) / (2 * 1.3**2)), process, x_t, t)
    torch.testing.assert_close(Denoiser(Gaussian(process, [[0.7]], [[1.3]]))(x_t, t, {}), wanted, rtol=1e-6, atol=1e-8)


@processes
def test_the_mixture_denoiser_is_the_posterior_mean_by_class_and_overall(name):
    process, t = PROCESSES[name], torch.tensor(INTERIOR[name], dtype=torch.float64)
    centres, std = [-1.0, 0.5, 2.0], 0.4
    view = Denoiser(Mixture(process, [[c] for c in centres], std))
    x_t = noised(process, torch.tensor([[-1.0], [0.5], [2.0], [0.0]], dtype=torch.float64), t)

    def density(*chosen):
        return lambda x0: sum(torch.exp(-((x0 - c) ** 2) / (2 * std**2)) for c in chosen)

    null = view(x_t, t, {"label": torch.full((4,), 3)})
    torch.testing.assert_close(null, posterior_mean(density(*centres), process, x_t, t), rtol=1e-6, atol=1e-8)
    for label, centre in enumerate(centres):
        got = view(x_t, t, {"label": torch.full((4,), label)})
        torch.testing.assert_close(got, posterior_mean(density(centre), process, x_t, t), rtol=1e-6, atol=1e-8)
    assert view.network.null["label"].tolist() == [3]


def test_each_row_of_a_gaussian_is_a_class_and_the_last_is_null():
    network = Gaussian(EDM(), [[1.0, 2.0], [-1.0, 0.5], [0.0, 0.0]], [[0.3, 0.4], [0.5, 0.6], [1.0, 1.1]])
    x, t = randn(3, 2), torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    got = Denoiser(network)(x, t, {"label": torch.tensor([1, 0, 2])})
    for row, label in enumerate((1, 0, 2)):
        alone = Gaussian(EDM(), [network.mean[label].tolist()], [network.std[label].tolist()])
        here = slice(row, row + 1)
        torch.testing.assert_close(got[here], Denoiser(alone)(x[here], t[here], {}))
    assert network.null["label"].tolist() == [2]
    assert Gaussian(EDM(), [[0.0]], [[1.0]]).null is None


@processes
def test_the_flow_map_solves_the_ode_whose_velocity_the_denoiser_gives(name):
    process, t = PROCESSES[name], torch.tensor(INTERIOR[name][1:], dtype=torch.float64)
    network, x = Gaussian(process, [[0.7]], [[1.3]]), randn(3, 1)
    mean, std = network._law(x, {})
    h = 1e-6 * t
    moved = network._moved(x, t, t - h, mean, std)
    velocity = Denoiser(network).predict(x, t, {}, VELOCITY)
    torch.testing.assert_close((x - moved) / h[:, None], velocity, rtol=1e-4, atol=1e-6)
    # a map: going there and further is going there at once
    half = network._moved(network._moved(x, t, t / 2, mean, std), t / 2, t / 4, mean, std)
    torch.testing.assert_close(half, network._moved(x, t, t / 4, mean, std))


@processes
def test_the_flow_map_keeps_the_marginals(name):
    process, t = PROCESSES[name], torch.tensor(INTERIOR[name][1:2], dtype=torch.float64)
    s = torch.tensor(INTERIOR[name][:1], dtype=torch.float64)
    network = Gaussian(process, [[0.7]], [[1.3]])
    here, there = ((a * 0.7, torch.hypot(a * 1.3, b)) for a, b in (process.alpha_sigma(t), process.alpha_sigma(s)))
    quantiles = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    x = here[0] + here[1] * quantiles
    mean, std = network._law(x, {})
    moved = network._moved(x, t.expand(5), s.expand(5), mean, std)
    torch.testing.assert_close(moved, there[0] + there[1] * quantiles)


@processes
def test_every_form_of_the_flow_map_is_the_same_map(name):
    process, t = PROCESSES[name], torch.tensor(INTERIOR[name], dtype=torch.float64)
    base, x = Gaussian(process, [[0.7]], [[1.3]]), randn(4, 1)
    whole = Denoiser(base.seen_as("flow_map"))(x, t, {})
    torch.testing.assert_close(Denoiser(base.seen_as("flow_map_f"))(x, t, {}), whole, rtol=1e-9, atol=1e-9)
    t_min = torch.full_like(t, process.t_min)
    average = base.seen_as("average")(x, t, {"s": t_min})
    torch.testing.assert_close(x - (t - t_min)[:, None] * average, whole)


def test_the_form_sets_the_kind():
    edm, rf = (Gaussian(process, [[0.0]], [[1.0]]) for process in (EDM(0.01, 80.0), RectifiedFlow()))
    assert edm.kind == edm.seen_as("generator").kind == edm.seen_as("signal").kind == X0
    assert edm.seen_as("average").kind == VELOCITY
    assert edm.seen_as("flow_map").kind.ends_at_t_min
    assert edm.seen_as("flow_map_f").kind == BoundaryF(0.5, 0.01)
    assert rf.seen_as("flow_map_f").kind == F(0.5)


def test_a_form_is_a_copy_that_shares_nothing():
    base = Gaussian(EDM(), [[0.7]], [[1.3]], trainable=True)
    twin = base.seen_as("generator")
    twin.mean.data += 1
    assert base.mean.item() == 0.7
    assert base.form == "denoiser"


@processes
def test_the_generator_form_is_affine_in_the_noise(name):
    process, z = PROCESSES[name], randn(4, 1)
    t = torch.full((4,), process.t_max, dtype=torch.float64)
    got = Denoiser(Gaussian(process, [[0.7]], [[1.3]], form="generator"))(process.add_noise(0 * z, z, t), t, {})
    torch.testing.assert_close(got, 0.7 + 1.3 * z)


def test_only_a_trainable_gaussian_has_gradients_and_may_be_copied():
    fixed, free = (Gaussian(EDM(), [[0.7]], [[1.3]], trainable=flag) for flag in (False, True))
    assert fixed.closed_form
    assert not free.closed_form
    x, t = randn(2, 1), torch.ones(2, dtype=torch.float64)
    assert not Denoiser(fixed)(x, t, {}).requires_grad
    Denoiser(free)(x, t, {}).sum().backward()
    assert free.mean.grad.abs() > 0
    assert free.std.grad.abs() > 0


def test_the_modes_of_a_circle_are_even_and_their_mixture_is_the_toy_data():
    centres = torch.tensor(circle(8, 2.0), dtype=torch.float64)
    torch.testing.assert_close(centres.norm(dim=1), torch.full((8,), 2.0, dtype=torch.float64))
    gaps = (centres - centres.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(gaps, torch.full((8,), 4 * math.sin(math.pi / 8), dtype=torch.float64))
    network = mixture_on_circle(EDM(), 8, 2.0, 0.05)
    clean = Denoiser(network)(centres, torch.full((8,), 0.01, dtype=torch.float64), {"label": torch.full((8,), 8)})
    torch.testing.assert_close(clean, centres, rtol=0, atol=1e-9)


def test_the_mixture_denoiser_far_out_is_finite_in_float32():
    network = mixture_on_circle(EDM(), 8, 1.0, 0.05)
    x, t = torch.full((2, 2), 1e4), torch.tensor([0.002, 80.0])
    assert Denoiser(network)(x, t, {"label": torch.tensor([8, 3])}).isfinite().all()


def test_the_toy_data_is_a_draw_from_the_exact_law():
    from diffdistill.data import Mixture2D

    data = Mixture2D(num_modes=4, radius=1.0, std=0.3)
    batch = data.batch(Rng(0, 0, "d", range(4000)), 4000, frozenset({"x0"}), torch.float64)
    view = Denoiser(mixture_on_circle(EDM(), 4, 1.0, 0.3))
    t = torch.full((4000,), 0.5, dtype=torch.float64)
    x_t = noised(EDM(), batch.x0, t)
    # the posterior mean leaves an error that is uncorrelated with everything it was given
    error = view(x_t, t, batch.cond) - batch.x0
    assert error.mean(0).abs().max() < 4 * 0.3 / math.sqrt(4000)
    assert (error * x_t).mean().abs() < 4 * 0.3 / math.sqrt(4000)


@pytest.mark.parametrize(("mean", "std"), [([[0.0, 1.0]], [[1.0]]), ([[0.0]], [[0.0]]), ([[0.0]], [[-1.0]])])
def test_impossible_laws_are_refused(mean, std):
    with pytest.raises(UserError, match=r"std must be positive and shaped like mean"):
        Gaussian(EDM(), mean, std)
