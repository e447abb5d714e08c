"""denoiser: guidance, change of process, recording, FlowMap and SignalMap on closed-form networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffdistill import UserError
from diffdistill.autodiff import jvp
from diffdistill.denoiser import Denoiser, FlowMap, Guidance, SignalMap
from diffdistill.networks.call import recorded_passes
from diffdistill.networks.exact import Gaussian, Mixture, circle
from diffdistill.networks.mlp import mlp_from_config
from diffdistill.process import EDM, EPS, VELOCITY, VP, X0, BoundaryF, RectifiedFlow, Trig, V, expand

PROCESSES = {
    "edm": EDM(0.002, 80.0),
    "vp": VP(),
    "rf": RectifiedFlow(),
    "trig": Trig(sigma_data=0.5),
}
INTERIOR = {
    "edm": [0.05, 0.5, 2.0, 20.0],
    "vp": [20.0, 250.5, 600.0, 900.3],
    "rf": [0.05, 0.3, 0.6, 0.9],
    "trig": [0.05, 0.5, 1.0, 1.5],
}
MEAN, STD = [[0.7, -0.2]], [[1.3, 0.4]]
processes = pytest.mark.parametrize("name", PROCESSES)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixture(process, dtype=torch.float64):
    """The exact mixture of four classes, states and labels of a batch at the interior times."""
    network = Mixture(process, circle(4), 0.3)
    name = next(key for key, value in PROCESSES.items() if value == process)
    t = torch.tensor(INTERIOR[name], dtype=dtype)
    labels = torch.tensor([0, 1, 2, 3])
    x0 = network.centres[labels].to(dtype)
    return network, process.add_noise(x0, randn(4, 2, dtype=dtype), t), t, {"label": labels}


def expected(network, x, t, labels):
    """D of the plain network by an unguided call."""
    return Denoiser(network)(x, t, {"label": labels})


# -- guidance -----------------------------------------------------------------------------------------------------


def test_guidance_one_is_the_conditional_model_at_one_network_call():
    network, x, t, cond = mixture(EDM())
    guided = Denoiser(network).guided(Guidance(1.0, network.null))
    with recorded_passes() as passes:
        got = guided(x, t, cond)
    assert len(passes) == 1
    assert torch.equal(got, expected(network, x, t, cond["label"]))


@processes
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_is_null_plus_scale_times_the_difference_at_two_calls(name, scale):
    network, x, t, cond = mixture(PROCESSES[name])
    with recorded_passes() as passes:
        got = Denoiser(network).guided(Guidance(scale, network.null))(x, t, cond)
    null = expected(network, x, t, torch.full((4,), 4))
    conditional = expected(network, x, t, cond["label"])
    assert (conditional - null).abs().max() > 0.01
    torch.testing.assert_close(got, null + scale * (conditional - null))
    assert [done.role for done in passes] == ["teacher"] * (2 if scale else 1)  # weight 0 reads no condition


def test_a_scale_for_each_sample_guides_each_by_its_own():
    network, x, t, cond = mixture(EDM())
    scale = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    got = Denoiser(network).guided(Guidance(scale, network.null))(x, t, cond)
    for row, w in enumerate(scale):
        alone = Denoiser(network).guided(Guidance(float(w), network.null))
        here = slice(row, row + 1)
        torch.testing.assert_close(got[here], alone(x[here], t[here], {"label": cond["label"][here]}))


def test_outside_its_interval_guidance_is_the_conditional_model():
    network, x, t, cond = mixture(EDM())
    got = Denoiser(network).guided(Guidance(3.0, network.null, interval=(0.5, 2.0)))(x, t, cond)
    everywhere = Denoiser(network).guided(Guidance(3.0, network.null))(x, t, cond)
    plain = expected(network, x, t, cond["label"])
    torch.testing.assert_close(got[1:3], everywhere[1:3])
    torch.testing.assert_close(got[[0, 3]], plain[[0, 3]])
    assert (everywhere - plain).abs().amax(1)[3] > 0.1


def test_a_negative_prompt_is_another_null_condition():
    network, x, t, cond = mixture(EDM())
    negative = {"label": torch.tensor([2])}
    got = Denoiser(network).guided(Guidance(3.0, negative))(x, t, cond)
    away = expected(network, x, t, torch.full((4,), 2))
    torch.testing.assert_close(got, away + 3 * (expected(network, x, t, cond["label"]) - away))


def test_a_guided_view_predicts_every_kind_of_the_guided_denoiser():
    network, x, t, cond = mixture(VP())
    guided = Denoiser(network).guided(Guidance(3.0, network.null))
    for kind in (EPS, V, VELOCITY):
        wanted = VP().convert(guided(x, t, cond), x, t, X0, kind)
        torch.testing.assert_close(guided.predict(x, t, cond, kind), wanted)


def test_guiding_a_raw_prediction_guides_the_denoiser():
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 1, 3, seed=0).double()
    x, t, cond = randn(4, 2), torch.tensor([0.01, 0.1, 1.0, 10.0]).double(), {"label": torch.tensor([0, 1, 2, 0])}
    view = Denoiser(network)
    null = view(x, t, {"label": torch.full((4,), 3)})
    wanted = null + 4 * (view(x, t, cond) - null)
    torch.testing.assert_close(view.guided(Guidance(4.0, network.null))(x, t, cond), wanted)


def test_guidance_can_be_taken_off_a_view():
    network, x, t, cond = mixture(EDM())
    guided = Denoiser(network).guided(Guidance(3.0, network.null))
    assert guided.guided(None) == Denoiser(network)


# -- change of process --------------------------------------------------------------------------------------------


@processes
@pytest.mark.parametrize("other", PROCESSES)
def test_under_another_process_the_denoiser_is_unchanged(name, other):
    network, x, t, cond = mixture(PROCESSES[name])
    changed = Denoiser(network).under(PROCESSES[other])
    t_other, factor = PROCESSES[name].match(changed.process, t)
    inside = (t_other > changed.process.t_min) & (t_other < changed.process.t_max)
    assert inside.sum() >= 2
    got = changed(expand(factor, x) * x, t_other, cond)
    torch.testing.assert_close(got[inside], Denoiser(network)(x, t, cond)[inside], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("other", ["vp", "rf", "trig"])
def test_under_another_process_a_raw_output_keeps_its_own_kind(other):
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 1, 0, seed=0).double()
    x, t = randn(4, 2), torch.tensor([0.05, 0.5, 2.0, 10.0], dtype=torch.float64)
    plain, changed = Denoiser(network), Denoiser(network).under(PROCESSES[other])
    t_other, factor = network.process.match(changed.process, t)
    moved = expand(factor, x) * x
    torch.testing.assert_close(changed(moved, t_other, {}), plain(x, t, {}), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(
        changed.predict(moved, t_other, {}, EPS), plain.predict(x, t, {}, EPS), rtol=1e-6, atol=1e-7
    )


def test_two_changes_of_process_are_one():
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 1, 0, seed=0).double()
    x, t = randn(3, 2), torch.tensor([0.2, 0.8, 1.3], dtype=torch.float64)
    once = Denoiser(network).under(Trig(sigma_data=0.5))
    twice = Denoiser(network).under(RectifiedFlow()).under(Trig(sigma_data=0.5))
    torch.testing.assert_close(twice(x, t, {}), once(x, t, {}), rtol=1e-7, atol=1e-8)


def test_under_covers_just_the_noise_levels_of_the_network():
    changed = Denoiser(Mixture(EDM(0.01, 10.0), circle(4), 0.3)).under(Trig(sigma_data=0.5))
    assert changed.process.t_min == pytest.approx(math.atan(0.01 / 0.5))
    assert changed.process.t_max == pytest.approx(math.atan(10.0 / 0.5))


def test_a_guidance_interval_follows_into_the_other_process():
    network, x, t, cond = mixture(EDM())
    guided = Denoiser(network).guided(Guidance(3.0, network.null, interval=(0.4, 2.5)))
    changed = guided.under(Trig(sigma_data=0.5))
    t_trig, factor = EDM().match(changed.process, t)
    torch.testing.assert_close(changed(expand(factor, x) * x, t_trig, cond), guided(x, t, cond), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("source", ["edm", "vp", "rf"])
@pytest.mark.parametrize("t_trig", [0.01, 0.5, 1.5, "t_max"])
def test_the_tangent_under_trig_is_finite_and_equal_to_the_float64_one(source, t_trig):
    changed = Denoiser(Gaussian(PROCESSES[source], MEAN, STD)).under(Trig(sigma_data=0.5))
    value = changed.process.t_max if t_trig == "t_max" else max(t_trig, changed.process.t_min)

    def tangent(dtype):
        t = torch.full((5,), value, dtype=dtype)
        x, dx = randn(5, 2, dtype=dtype), randn(5, 2, seed=1, dtype=dtype)
        return jvp(lambda x, t: changed(x, t, {}), (x, t), (dx, torch.ones_like(t)))[1]

    double = tangent(torch.float64)
    assert double.isfinite().all()
    torch.testing.assert_close(tangent(torch.float32).double(), double, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("source", ["edm", "vp", "rf"])
@pytest.mark.parametrize("t_trig", [0.01, 0.5, 1.5, "t_max"])
def test_the_tangent_under_trig_is_that_of_the_gaussian_denoiser_in_trig(source, t_trig):
    changed = Denoiser(Gaussian(PROCESSES[source], MEAN, STD)).under(Trig(sigma_data=0.5))
    native = Denoiser(Gaussian(Trig(sigma_data=0.5), MEAN, STD))
    value = changed.process.t_max if t_trig == "t_max" else max(t_trig, changed.process.t_min)
    t, x, dx = torch.full((5,), value, dtype=torch.float64), randn(5, 2), randn(5, 2, seed=1)
    tangents = [
        jvp(lambda x, t, view=view: view(x, t, {}), (x, t), (dx, torch.ones_like(t)))[1] for view in (changed, native)
    ]
    torch.testing.assert_close(*tangents, rtol=1e-5, atol=1e-6)


# -- recording ----------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A block that counts its calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args):
        self.calls += 1
        return self.inner(*args)


@pytest.fixture
def deep():
    """A three-block network whose blocks count their calls, with a batch."""
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 3, 3, seed=0)
    network.layers = nn.ModuleList(Counted(layer) for layer in network.layers)
    x, t = randn(4, 2, dtype=torch.float32), torch.tensor([0.01, 0.1, 1.0, 10.0])
    return network, x, t, {"label": torch.tensor([0, 1, 2, 0])}


def hidden_states(network, x, t, cond):
    """The block outputs of a plain forward pass, by hand."""
    embedding = network.time_embedding(network.time(t)) + network.class_embedding(cond["label"])
    hidden, states = network.inlet(expand(network.scale(t), x) * x), []
    for layer in network.layers:
        hidden = layer.inner(hidden, embedding)
        states.append(hidden)
    return states


def test_record_gives_the_activations_of_the_calls_inside_without_an_extra_pass(deep):
    network, x, t, cond = deep
    view = Denoiser(network, "student")
    with recorded_passes() as passes, view.record((0, 2)) as found:
        first = view(x, t, cond)
        view(2 * x, t, cond)
    assert len(passes) == 2
    assert torch.equal(first, view(x, t, cond))
    for layer in (0, 2):
        assert torch.equal(found[layer][0], hidden_states(network, x, t, cond)[layer])
        assert torch.equal(found[layer][1], hidden_states(network, 2 * x, t, cond)[layer])
    with recorded_passes():
        view(x, t, cond)
    assert len(found[0]) == 2, "nothing is stored after the context"


def test_record_only_sees_the_calls_of_its_own_role(deep):
    network, x, t, cond = deep
    student, teacher = Denoiser(network, "student"), Denoiser(network, "teacher")
    with student.record((1,)) as found:
        teacher(x, t, cond)
        student(2 * x, t, cond)
        teacher(x, t, cond)
    assert len(found[1]) == 1
    assert torch.equal(found[1][0], hidden_states(network, 2 * x, t, cond)[1])


def test_a_guided_call_records_the_conditional_and_the_null_pass(deep):
    network, x, t, cond = deep
    view = Denoiser(network).guided(Guidance(2.0, network.null))
    with view.record((1,)) as found:
        view(x, t, cond)
    null = {"label": torch.full((4,), 3)}
    assert torch.equal(found[1][0], hidden_states(network, x, t, cond)[1])
    assert torch.equal(found[1][1], hidden_states(network, x, t, null)[1])


def test_features_stop_after_the_last_layer_asked_for(deep):
    network, x, t, cond = deep
    with recorded_passes() as passes:
        second, first = Denoiser(network).features(x, t, cond, (1, 0))
    assert [layer.calls for layer in network.layers] == [1, 1, 0]
    assert passes[0].layers == (1, 0)
    assert torch.equal(first, hidden_states(network, x, t, cond)[0])
    assert torch.equal(second, hidden_states(network, x, t, cond)[1])


def test_gradient_flows_through_features_to_the_input(deep):
    network, x, t, cond = deep
    x.requires_grad_(True)
    Denoiser(network).features(x, t, cond, (1,))[0].square().sum().backward()
    got = x.grad.clone()
    x.grad = None
    hidden_states(network, x, t, cond)[1].square().sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=0, atol=0)
    assert got.abs().min() > 0


def test_features_leave_no_call_and_no_hook_behind(deep):
    network, x, t, cond = deep
    view = Denoiser(network)
    before = view(x, t, cond)
    view.features(x, t, cond, (0,))
    assert torch.equal(view(x, t, cond), before)
    assert not any(layer._forward_hooks for layer in network.layers)


@pytest.mark.parametrize("layers", [(), (3,), (-1,)])
def test_layers_that_do_not_exist_are_refused(deep, layers):
    network, x, t, cond = deep
    with pytest.raises(UserError, match="layers must be indices of the network's 3 blocks"):
        Denoiser(network).features(x, t, cond, layers)


def test_recording_works_under_another_process(deep):
    network, x, t, cond = deep
    changed = Denoiser(network).under(RectifiedFlow())
    t_rf, factor = network.process.match(changed.process, t)
    found = changed.features(expand(factor, x) * x, t_rf, cond, (1,))[0]
    torch.testing.assert_close(found, hidden_states(network, x, t, cond)[1], rtol=1e-3, atol=1e-3)


# -- flow maps ----------------------------------------------------------------------------------------------------


def moved(process, x, t, s):
    """The Gaussian's closed PF-ODE map."""
    mean, std = torch.tensor(MEAN, dtype=x.dtype), torch.tensor(STD, dtype=x.dtype)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    spread = [
        ((alpha[:, None] * std) ** 2 + sigma[:, None] ** 2).sqrt()
        for alpha, sigma in ((alpha_t, sigma_t), (alpha_s, sigma_s))
    ]
    return alpha_s[:, None] * mean + (x - alpha_t[:, None] * mean) * spread[1] / spread[0]


def flow_map(process, form, head):
    return FlowMap(Denoiser(Gaussian(process, MEAN, STD, form=form)), head)


def pair_of_times(name):
    t = torch.tensor(INTERIOR[name][1:], dtype=torch.float64)
    s = torch.tensor(INTERIOR[name][:-1], dtype=torch.float64)
    return t, s, randn(3, 2)


@processes
def test_the_average_head_moves_to_any_earlier_time(name):
    t, s, x = pair_of_times(name)
    f = flow_map(PROCESSES[name], "average", "average")
    torch.testing.assert_close(f(x, t, s, {}), moved(PROCESSES[name], x, t, s))
    t_min = torch.full_like(t, PROCESSES[name].t_min)
    torch.testing.assert_close(f.x0(x, t, {}), moved(PROCESSES[name], x, t, t_min))


@processes
def test_the_average_velocity_times_the_span_is_the_displacement(name):
    process, (t, s, x) = PROCESSES[name], pair_of_times(name)
    for form, head in (("average", "average"), ("denoiser", "jump"), ("flow_map", "consistency")):
        f = flow_map(process, form, head)
        end = torch.full_like(s, process.t_min) if head == "consistency" else s
        u = f.average_velocity(x, t, end, {})
        torch.testing.assert_close(x - expand(t - end, x) * u, f(x, t, end, {}), rtol=1e-9, atol=1e-9)


@processes
@pytest.mark.parametrize(("form", "head"), [("average", "average"), ("denoiser", "jump")])
def test_the_average_velocity_over_no_time_is_the_velocity(name, form, head):
    process, (t, _, x) = PROCESSES[name], pair_of_times(name)
    velocity = Denoiser(Gaussian(process, MEAN, STD)).predict(x, t, {}, VELOCITY)
    u = flow_map(process, form, head).average_velocity(x, t, t, {})
    torch.testing.assert_close(u, velocity)
    half = torch.where(torch.tensor([True, False, True]), t, t - 1e-6 * t)
    nearly = flow_map(process, form, head).average_velocity(x, t, half, {})
    torch.testing.assert_close(nearly, velocity, rtol=1e-4, atol=1e-5)


@processes
def test_the_jump_head_is_a_ddim_step_and_stays_where_s_is_t(name):
    process, (t, s, x) = PROCESSES[name], pair_of_times(name)
    f = flow_map(process, "denoiser", "jump")
    x0 = f.denoiser(x, t, {})
    eps = process.convert(x0, x, t, X0, EPS)
    torch.testing.assert_close(f(x, t, s, {}), process.add_noise(x0, eps, s))
    assert torch.equal(f(x, t, t, {}), x)


@processes
@pytest.mark.parametrize("form", ["flow_map", "flow_map_f", "denoiser"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_consistency_head_returns_its_input_bit_for_bit_at_t_min(name, form, dtype):
    f = flow_map(PROCESSES[name], form, "consistency")
    t = torch.full((6,), PROCESSES[name].t_min, dtype=dtype)
    x = randn(6, 2, dtype=dtype)
    if name == "vp" and form == "flow_map_f":  # its boundary scalings end at x / alpha(t_min)
        torch.testing.assert_close(f(x, t, t, {}), x, rtol=1e-4, atol=0)
        return
    assert torch.equal(f(x, t, t, {}), x)


@processes
@pytest.mark.parametrize("form", ["flow_map", "flow_map_f"])
def test_the_consistency_head_ends_at_t_min_whatever_s_says(name, form):
    t, s, x = pair_of_times(name)
    f = flow_map(PROCESSES[name], form, "consistency")
    end = moved(PROCESSES[name], x, t, torch.full_like(t, PROCESSES[name].t_min))
    torch.testing.assert_close(f(x, t, s, {}), end, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(f.x0(x, t, {}), end, rtol=1e-6, atol=1e-9)


def test_a_network_with_boundary_scalings_gives_its_denoiser_as_the_consistency_map():
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 1, 0, seed=0)
    network.kind = BoundaryF(0.5, 0.002)
    view, x = Denoiser(network), randn(3, 2, dtype=torch.float32)
    f, t = FlowMap(view, "consistency"), torch.tensor([0.002, 0.5, 20.0])
    assert torch.equal(f.x0(x, t, {}), view(x, t, {}))
    assert torch.equal(f.x0(x, t, {})[0], x[0])
    assert not torch.allclose(
        FlowMap(view, "jump")(x, t, torch.full_like(t, 0.002), {})[1], view(x, t, {})[1], rtol=1e-5
    )


@processes
@pytest.mark.parametrize(
    ("form", "head"),
    [("average", "average"), ("denoiser", "jump"), ("flow_map", "consistency"), ("flow_map_f", "consistency")],
)
def test_no_head_makes_nan_anywhere_in_the_range(name, form, head):
    process = PROCESSES[name]
    t = torch.linspace(process.t_min, process.t_max, 9, dtype=torch.float32)
    t[-1] = process.t_max
    x = randn(9, 2, dtype=torch.float32)
    f = flow_map(process, form, head)
    if head == "average":  # the velocity needs eps, which a clean x0 prediction does not fix at sigma = 0
        t, x = t[1:], x[1:]
    for s in (t, torch.full_like(t, process.t_min)):
        assert f(x, t, s, {}).isfinite().all()


def test_an_unknown_head_is_refused():
    with pytest.raises(UserError, match="head must be consistency, jump or average, got midpoint"):
        FlowMap(Denoiser(Gaussian(EDM(), MEAN, STD)), "midpoint")


class Heard(Gaussian):
    """A Gaussian that keeps the condition it was called with."""

    def forward(self, x, t_net, cond):
        self.cond = cond
        return super().forward(x, t_net, cond)


def test_only_the_average_head_gives_the_network_the_target_time():
    t, s, x = pair_of_times("edm")
    for form, head in (("average", "average"), ("denoiser", "jump"), ("flow_map", "consistency")):
        network = Heard(EDM(), MEAN, STD, form=form)
        FlowMap(Denoiser(network), head)(x, t, s, {})
        assert ("s" in network.cond) == (head == "average")


# -- signal map ---------------------------------------------------------------------------------------------------


@processes
def test_the_signal_map_follows_the_signal_part_of_the_trajectory(name):
    process, z = PROCESSES[name], randn(4, 2)
    y = SignalMap(Denoiser(Gaussian(process, MEAN, STD, form="signal")))
    t = torch.tensor(INTERIOR[name], dtype=torch.float64)
    t_max = torch.full_like(t, process.t_max)
    x_t = moved(process, expand(process.alpha_sigma(t_max)[1], z) * z, t_max, t)
    alpha, sigma = process.alpha_sigma(t)
    torch.testing.assert_close(y(z, t, {}), (x_t - sigma[:, None] * z) / alpha[:, None], rtol=1e-6, atol=1e-8)


@processes
def test_the_signal_map_ends_where_the_trajectory_ends(name):
    process, z = PROCESSES[name], randn(4, 2)
    y = SignalMap(Denoiser(Gaussian(process, MEAN, STD, form="signal")))
    t_max = torch.full((4,), process.t_max, dtype=torch.float64)
    t_min = torch.full_like(t_max, process.t_min)
    prior = expand(process.alpha_sigma(t_max)[1], z) * z
    alpha, sigma = process.alpha_sigma(t_min)
    end = (moved(process, prior, t_max, t_min) - sigma[:, None] * z) / alpha[:, None]
    torch.testing.assert_close(y(z, t_min, {}), end, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(y.x0(prior, t_max, {}), end, rtol=1e-6, atol=1e-8)


@processes
def test_the_signal_at_t_max_is_finite_and_where_alpha_vanishes_the_denoiser(name):
    process, z = PROCESSES[name], randn(4, 2)
    y = SignalMap(Denoiser(Gaussian(process, MEAN, STD, form="signal")))
    t_max = torch.full((4,), process.t_max, dtype=torch.float64)
    start = y(z, t_max, {})
    if process.alpha_sigma(t_max)[0][0] < 1e-9:
        wanted = Denoiser(Gaussian(process, MEAN, STD))(expand(process.alpha_sigma(t_max)[1], z) * z, t_max, {})
    else:  # the trajectory starts at pure noise, without signal
        wanted = torch.zeros_like(z)
    torch.testing.assert_close(start, wanted, rtol=0, atol=1e-6)


def test_bootstrapping_the_exact_signal_leaves_a_residual_that_halves_with_the_step():
    process, z = RectifiedFlow(), randn(4, 2)
    y = SignalMap(Denoiser(Gaussian(process, MEAN, STD, form="signal")))
    teacher = Denoiser(Gaussian(process, MEAN, STD))
    t = torch.full((4,), 0.6, dtype=torch.float64)

    def residual(delta):
        s = t - delta
        y_t = y(z, t, {})
        x_t = expand(1 - t, z) * y_t + expand(t, z) * z
        kappa = expand(1 - s * (1 - t) / (t * (1 - s)), z)
        target = y_t + kappa * (teacher(x_t, t, {}) - y_t)
        return ((y(z, s, {}) - target) / kappa).abs().mean()

    assert residual(0.02) / residual(0.01) == pytest.approx(2, rel=0.1)


def test_the_signal_map_always_feeds_the_scaled_prior_and_embeds_the_time_asked_for():
    class Keeps(Gaussian):
        def forward(self, x, t_net, cond):
            self.seen = x, t_net
            return super().forward(x, t_net, cond)

        def scale(self, t):
            return 1 / (1 + t)

    network = Keeps(EDM(), MEAN, STD)
    z, t = randn(3, 2), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    SignalMap(Denoiser(network))(z, t, {})
    torch.testing.assert_close(network.seen[0], 80 / 81 * z)
    assert torch.equal(network.seen[1], t)


def test_a_changed_process_is_matched_once_per_call_and_anew_for_other_times(monkeypatch: pytest.MonkeyPatch) -> None:
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 2, 3, seed=0)
    view = Denoiser(network, "student").under(RectifiedFlow(0.01, 0.98))
    x, t, cond = torch.randn(4, 2), torch.linspace(0.1, 0.9, 4), {"label": torch.zeros(4, dtype=torch.long)}
    matched = []
    match = RectifiedFlow.match
    monkeypatch.setattr(RectifiedFlow, "match", lambda self, *given: matched.append(1) or match(self, *given))
    first = view(x, t, cond)
    assert len(matched) == 1
    assert torch.equal(view(x, t, cond), first) and len(matched) == 1
    t += 0.01
    moved = view(x, t, cond)
    assert len(matched) == 2 and not torch.equal(moved, first)
    assert torch.equal(view(x, t.clone(), cond), moved) and len(matched) == 3

    def at(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return view(x, t, cond)

    value, tangent = jvp(at, (x, t), (torch.zeros_like(x), torch.ones_like(t)))
    jvp(lambda x: view(x, t, cond), (x,), (x,))  # with t held: what is made there is not kept for outside
    assert view.network.match._last[0] is not t
    torch.testing.assert_close(view(x, t, cond), value)
    step = (view(x, t + 1e-3, cond) - view(x, t - 1e-3, cond)) / 2e-3
    torch.testing.assert_close(tangent, step, rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        view(x, t, cond)
    network.requires_grad_(True)
    wanting = t.clone().requires_grad_()
    view(x, wanting, cond).sum().backward()
    assert wanting.grad is not None and wanting.grad.abs().min() > 0
