"""generator: rollouts see the inputs of inference, gradient flows through the last call only."""

from __future__ import annotations

import pytest
import torch

from diffdistill import UserError
from diffdistill import generator as renoise
from diffdistill.denoiser import Denoiser, FlowMap, Guidance, SignalMap
from diffdistill.generator import Generator, last_step, per_sample_step, shared_step
from diffdistill.networks.call import recorded_passes
from diffdistill.networks.exact import Gaussian, Mixture, circle
from diffdistill.process import EDM, VP, RectifiedFlow, expand
from diffdistill.rng import Rng

B = 6
EDM_TIMES = (60.0, 5.0, 0.5, 0.05)
MEAN, STD = [[0.7, -0.2]], [[1.3, 0.4]]
RENOISE = {name: getattr(renoise, name) for name in ("fresh", "fresh_from_t_min", "ddim", "fixed")}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rng(seed=0):
    return Rng(seed, 3, "student", range(B))


def fixed_step(k):
    """An `until` that always stops at call k."""
    return lambda rng, num_steps, batch: k


class Kept(Gaussian):
    """A trainable Gaussian that keeps the inputs of its calls."""

    def __init__(self, process):
        super().__init__(process, MEAN, STD, trainable=True)
        self.seen = []

    def forward(self, x, t_net, cond):
        self.seen.append((x.detach().clone(), t_net.clone(), cond["step"].clone()))
        return super().forward(x, t_net, cond)


def student(process=None):
    return Denoiser(Kept(process or EDM()), "student")


def inference_inputs(generator, z, draws):
    """Input, time and step of every call that `sample` makes."""
    network = generator.student.network
    network.seen.clear()
    generator.sample(z, {}, draws)
    seen = list(network.seen)
    network.seen.clear()
    return seen


# -- inputs of training are inputs of inference -------------------------------------------------------------------


@pytest.mark.parametrize("name", RENOISE)
@pytest.mark.parametrize("k", range(4))
def test_a_rollout_until_call_k_sees_bit_for_bit_what_inference_sees_there(name, k):
    generator, z = Generator(student(), EDM_TIMES, RENOISE[name]), randn(B, 2)
    seen = inference_inputs(generator, z, rng())
    rollout = generator.rollout(z, {}, rng(), fixed_step(k))
    assert torch.equal(rollout.x_in, seen[k][0])
    assert torch.equal(rollout.t, seen[k][1])
    assert torch.equal(rollout.k, seen[k][2])
    assert torch.equal(rollout.x0, generator.student.x0(seen[k][0], seen[k][1], {"step": seen[k][2]}))


@pytest.mark.parametrize("until", [shared_step, last_step])
@pytest.mark.parametrize("name", RENOISE)
def test_shared_and_last_steps_stop_at_one_inference_input_for_the_whole_batch(until, name):
    generator, z = Generator(student(), EDM_TIMES, RENOISE[name]), randn(B, 2)
    for seed in range(4):
        rollout = generator.rollout(z, {}, rng(seed), until)
        assert len(rollout.k.unique()) == 1
        seen = inference_inputs(generator, z, rng(seed))[int(rollout.k[0])]
        assert torch.equal(rollout.x_in, seen[0])
        assert torch.equal(rollout.t, seen[1])


@pytest.mark.parametrize("name", RENOISE)
def test_per_sample_steps_gather_each_samples_own_inference_input(name):
    generator, z = Generator(student(), EDM_TIMES, RENOISE[name]), randn(B, 2)
    kinds = set()
    for seed in range(4):
        rollout = generator.rollout(z, {}, rng(seed), per_sample_step)
        seen = inference_inputs(generator, z, rng(seed))
        for row in range(B):
            k = int(rollout.k[row])
            kinds.add(k)
            assert torch.equal(rollout.x_in[row], seen[k][0][row])
            assert rollout.t[row] == EDM_TIMES[k]
            assert rollout.s[row] == (*EDM_TIMES, 0.002)[k + 1]
    assert kinds == {0, 1, 2, 3}


def test_the_last_rollout_is_the_sample():
    generator, z = Generator(student(), EDM_TIMES), randn(B, 2)
    rollout = generator.rollout(z, {}, rng(), last_step)
    assert torch.equal(rollout.x0, generator.sample(z, {}, rng()))
    assert torch.equal(rollout.x_out, rollout.x0)
    assert torch.equal(rollout.s, torch.full((B,), 0.002, dtype=torch.float64))


@pytest.mark.parametrize("name", RENOISE)
def test_x_out_is_the_next_inference_input(name):
    generator, z = Generator(student(), EDM_TIMES, RENOISE[name]), randn(B, 2)
    rollout = generator.rollout(z, {}, rng(), fixed_step(1))
    seen = inference_inputs(generator, z, rng())
    assert torch.equal(rollout.x_out, seen[2][0])
    assert torch.equal(rollout.s, seen[2][1])


def test_shared_step_is_uniform_and_equal_over_ranks_and_micro_batches():
    chosen = [shared_step(Rng(0, step, "p", range(8)), 4, 8) for step in range(400)]
    assert max(abs(chosen.count(k) - 100) for k in range(4)) < 35
    assert chosen == [shared_step(Rng(0, step, "p", range(40, 48)), 4, 8) for step in range(400)]


def test_per_sample_step_is_uniform():
    k = per_sample_step(Rng(0, 0, "p", range(4000)), 4, 4000)
    assert (torch.bincount(k) - 1000).abs().max() < 110


# -- gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [fixed_step(2), per_sample_step], ids=["shared", "per_sample"])
@pytest.mark.parametrize("name", RENOISE)
def test_gradient_flows_through_the_last_call_only(until, name):
    view = student()
    z = randn(B, 2).requires_grad_(True)
    rollout = Generator(view, EDM_TIMES, RENOISE[name]).rollout(z, {}, rng(), until)
    assert not rollout.x_in.requires_grad
    rollout.x0.square().sum().backward()
    got = view.network.mean.grad.clone()
    assert z.grad is None
    view.network.mean.grad = None
    view.x0(rollout.x_in, rollout.t, {"step": rollout.k}).square().sum().backward()
    torch.testing.assert_close(got, view.network.mean.grad, rtol=0, atol=0)
    assert got.abs().min() > 0


@pytest.mark.parametrize(
    ("until", "calls"), [(fixed_step(0), 1), (fixed_step(2), 3), (last_step, 4), (per_sample_step, 4)]
)
def test_a_rollout_makes_only_the_calls_it_needs_and_one_with_gradient(until, calls):
    generator = Generator(student(), EDM_TIMES)
    with recorded_passes() as passes:
        generator.rollout(randn(B, 2), {}, rng(), until)
    assert len(passes) == calls
    assert [done.backward for done in passes] == [False] * (calls - 1) + [True]


def test_sampling_keeps_no_graph():
    assert not Generator(student(), EDM_TIMES).sample(randn(B, 2), {}, rng()).requires_grad


# -- re-noising ---------------------------------------------------------------------------------------------------


def step_states(process):
    x0, eps, other = randn(3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2)
    lengths = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64)
    t = process.t_min + lengths * (process.t_max - process.t_min)
    return x0, eps, other, t, process.t_min + 0.3 * (t - process.t_min)


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()])
def test_fresh_and_fixed_noise_the_prediction_with_the_noise_given(process):
    x0, eps, x_t, t, s = step_states(process)
    alpha, sigma = process.alpha_sigma(s)
    for function in (renoise.fresh, renoise.fixed):
        got = function(process, x0, x_t, t, s, eps)
        torch.testing.assert_close(got, alpha[:, None] * x0 + sigma[:, None] * eps)


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()])
def test_ddim_keeps_the_noise_that_state_and_prediction_imply(process):
    x0, eps, _, t, s = step_states(process)
    x_t = process.add_noise(x0, eps, t)
    got = renoise.ddim(process, x0, x_t, t, s, randn(3, 2, seed=9))
    torch.testing.assert_close(got, process.add_noise(x0, eps, s))


def test_fresh_from_t_min_is_the_step_of_diffusers_consistency_scheduler():
    from diffusers import CMStochasticIterativeScheduler

    x0, eps, x_t, t, s = step_states(EDM())
    got = renoise.fresh_from_t_min(EDM(), x0, x_t, t, s, eps)
    torch.testing.assert_close(got, x0 + expand((s**2 - 0.002**2).sqrt(), x0) * eps)

    stock = CMStochasticIterativeScheduler(10, sigma_min=0.002, sigma_max=80.0, clip_denoised=False)
    stock.set_timesteps(timesteps=[9, 4])
    stock.is_scale_input_called = True  # the network is fed unscaled
    times = tuple(float(sigma) for sigma in stock.sigmas[:2])
    network = Gaussian(EDM(), MEAN, STD, form="flow_map_f", dtype="float32")
    process = EDM(0.002, times[0])
    network.process = process
    generator = Generator(Denoiser(network), times, renoise.fresh_from_t_min)
    z = randn(B, 2).float()
    x = times[0] * z
    draws = rng().fork("renoise")
    for timestep, sigma in zip(stock.timesteps, times, strict=True):
        raw = network(x, torch.full((B,), sigma), {})
        noise = draws.normal((B, 2)) if sigma == times[0] else torch.zeros(B, 2)
        x = manual_step(stock, raw, timestep, x, noise)
    torch.testing.assert_close(generator.sample(z, {}, rng()), x, rtol=1e-4, atol=1e-4)


def manual_step(stock, raw, timestep, x, noise):
    """The scheduler's step with its noise given."""
    from unittest import mock

    with mock.patch("diffusers.schedulers.scheduling_consistency_models.randn_tensor", return_value=noise):
        return stock.step(raw, timestep, x, return_dict=False)[0]


def test_fixed_noise_makes_sampling_a_function_of_z_alone():
    z = randn(B, 2)
    generator = Generator(student(), EDM_TIMES, renoise.fixed)
    assert torch.equal(generator.sample(z, {}, rng(0)), generator.sample(z, {}, rng(1)))
    fresh = Generator(student(), EDM_TIMES, renoise.fresh)
    assert not torch.equal(fresh.sample(z, {}, rng(0)), fresh.sample(z, {}, rng(1)))


# -- prior, grid, students ----------------------------------------------------------------------------------------


def test_the_first_input_has_the_noise_level_of_the_first_time_even_below_t_max():
    generator, z = Generator(student(), (2.5,)), randn(B, 2)
    assert torch.equal(inference_inputs(generator, z, rng())[0][0], 2.5 * z)


def test_prior_std_replaces_the_noise_level_of_the_first_input_only():
    generator, z = Generator(student(VP()), (399.0, 100.0), renoise.fixed, prior_std=1.0), randn(B, 2)
    seen = inference_inputs(generator, z, rng())
    assert torch.equal(seen[0][0], z)
    x0 = generator.student.x0(z, seen[0][1], {"step": seen[0][2]})
    torch.testing.assert_close(seen[1][0], VP().add_noise(x0, z, seen[1][1]))


@pytest.mark.parametrize("times", [(), (81.0,), (1.0, 0.002), (1.0, 2.0), (1.0, 1.0)])
def test_times_outside_the_range_or_not_decreasing_are_refused(times):
    with pytest.raises(UserError, match="distiller.times must decrease within"):
        Generator(student(), times)


def test_every_call_is_told_its_step():
    seen = inference_inputs(Generator(student(), EDM_TIMES), randn(B, 2), rng())
    assert [step.tolist() for _, _, step in seen] == [[k] * B for k in range(4)]


@pytest.mark.parametrize("guided", [False, True])
def test_nfe_is_the_counted_number_of_network_calls(guided):
    network = Mixture(EDM(), circle(4), 0.3)
    view = Denoiser(network).guided(Guidance(2.0, network.null)) if guided else Denoiser(network)
    generator = Generator(view, EDM_TIMES)
    with recorded_passes() as passes:
        generator.sample(randn(B, 2), {"label": torch.zeros(B, dtype=torch.long)}, rng())
    assert generator.nfe == len(passes) == (8 if guided else 4)


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()])
def test_exact_students_of_every_type_generate_the_gaussian_in_one_step(process):
    mean, std = torch.tensor(MEAN[0], dtype=torch.float64), torch.tensor(STD[0], dtype=torch.float64)
    z, draws = randn(20_000, 2), Rng(0, 0, "s", range(20_000))
    forms = {
        "generator": lambda view: view,
        "flow_map": lambda view: FlowMap(view, "consistency"),
        "average": lambda view: FlowMap(view, "average"),
        "signal": SignalMap,
    }
    for form, wrap in forms.items():
        view = Denoiser(Gaussian(process, MEAN, STD, form=form))
        x = Generator(wrap(view), (process.t_max,)).sample(z, {}, draws)
        # a prior of finite noise has no signal: the trajectory is off by that much
        torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.05)
        torch.testing.assert_close(x.std(0), std, rtol=0.03, atol=0)


def test_samples_do_not_depend_on_how_the_batch_is_split():
    generator, z = Generator(student(), EDM_TIMES), randn(B, 2)
    whole = generator.sample(z, {}, Rng(0, 0, "s", range(B)))
    parts = [generator.sample(z[a:b], {}, Rng(0, 0, "s", range(a, b))) for a, b in ((0, 2), (2, B))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_another_number_of_steps_needs_a_student_that_knows_times_for_it():
    from diffdistill.solvers import karras_few

    student = Denoiser(Gaussian(EDM(0.002, 20.0), [[0.7]], [[1.3]]))
    own = Generator(student, (2.5,))
    assert own.with_steps(1) is own
    with pytest.raises(UserError, match="steps must be 1"):
        own.with_steps(2)
    any_number = Generator(student, (2.5,), few_steps=lambda process, num: karras_few(process, num, 24))
    times = any_number.with_steps(3).times
    assert times[0] == 2.5  # from the student's own first time, not from t_max
    assert len(times) == 3
