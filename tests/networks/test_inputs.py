"""inputs: extra scalar inputs of one role's network, zero at first and trained from there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffdistill import UserError
from diffdistill.denoiser import Denoiser, FlowMap
from diffdistill.networks.call import Call, enter
from diffdistill.networks.inputs import EmbeddingWithInputs, ScalarEmbedder, sinusoid
from diffdistill.networks.lora import LoraSpec
from diffdistill.networks.mlp import mlp_from_config
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import RectifiedFlow, expand

both_modes = pytest.mark.parametrize("mode", ["copy", "lora"])
NAMES = ("w", "s", "step")
VALUES = {
    "w": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "s": torch.tensor([0.002, 0.01, 0.5, 2.0]),
    "step": torch.tensor([0, 1, 2, 3]),
}


def build(mode, inputs=NAMES, **lora):
    torch.manual_seed(0)
    teacher = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 2, 0, seed=0)
    roles = {"student": Role(inputs=inputs), "fake_score": Role()}
    modes = {"student": mode, "fake_score": mode}
    return Networks(teacher, roles, (2,), {}, modes=modes, lora=LoraSpec(4, **lora))


def batch():
    t = torch.tensor([0.01, 0.1, 1.0, 10.0])
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), t


def embedders(networks):
    return networks["student"].network.time_embedding.roles["student"]


def test_sinusoids_have_frequencies_from_one_down_to_the_inverse_period():
    value = torch.tensor([0.3, 2.0], dtype=torch.float64)
    got = sinusoid(value, 6, max_period=1000.0)
    for column, frequency in enumerate((1.0, 1000 ** (-1 / 3), 1000 ** (-2 / 3))):
        torch.testing.assert_close(got[:, column], torch.cos(value * frequency))
        torch.testing.assert_close(got[:, 3 + column], torch.sin(value * frequency))


def test_only_the_last_linear_of_an_embedder_is_zero():
    torch.manual_seed(0)
    embedder = ScalarEmbedder(16, lambda value: value)
    assert torch.equal(embedder(torch.tensor([0.3, 2.0])), torch.zeros(2, 16))
    assert embedder.first.weight.abs().min() > 0
    embedder(torch.tensor([0.3, 2.0])).sum().backward()
    # the first step moves weights that see the input, not a bias alone
    assert embedder.last.weight.grad.abs().max() > 0


@both_modes
def test_extra_inputs_leave_the_network_as_it_was_bit_for_bit_at_first(mode):
    networks = build(mode)
    x, t = batch()
    wanted = Denoiser(mlp_from_config(0.5, 0.002, 20.0, 2, 16, 2, 0, seed=0))(x, t, {})
    assert torch.equal(networks["student"](x, t, VALUES), wanted)
    assert torch.equal(networks["teacher"](x, t, {}), wanted)


@both_modes
@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_value_is_an_error_that_names_role_and_input(mode, missing):
    networks = build(mode)
    x, t = batch()
    cond = {name: value for name, value in VALUES.items() if name != missing}
    with pytest.raises(ValueError, match=rf"role student reads the extra input {missing}, but cond has no {missing}"):
        networks["student"](x, t, cond)
    networks["fake_score"](x, t, {})
    networks["teacher"](x, t, {})


@both_modes
@pytest.mark.parametrize("name", NAMES)
def test_extra_inputs_train_until_the_output_depends_on_their_value(mode, name):
    networks = build(mode, (name,))
    x, t = batch()
    networks.train_only(("student",))
    names = {key for key, _ in networks.named_weights("student")}
    assert any(f"{name}.last.weight" in key for key in names)
    optimizer = torch.optim.Adam(networks.weights("student"), 0.05)
    target = torch.linspace(-1, 1, 4)[:, None].expand(4, 2)
    same = torch.ones(4, 2)
    for _ in range(15):
        networks.zero_grad()
        (networks["student"](same, torch.ones(4), {name: VALUES[name]}) - target).square().sum().backward()
        optimizer.step()
    assert embedders(networks)[name].first.weight.grad.abs().max() > 0
    got = networks["student"](same, torch.ones(4), {name: VALUES[name]})
    assert (got[0] - got[-1]).abs().max() > 1e-2
    assert torch.equal(networks["teacher"](x, t, {}), build(mode)["teacher"](x, t, {}))


def test_the_embedding_gains_the_sum_of_the_embedded_values_of_the_role_in_progress():
    torch.manual_seed(0)
    wrapped = EmbeddingWithInputs(nn.Linear(3, 8))
    roles = wrapped.add("student", ("w", "step"), 8)
    for embedder in roles.values():
        nn.init.normal_(embedder.last.weight)
    x, w, step = torch.randn(2, 3), torch.tensor([0.001, 0.002]), torch.tensor([0, 3])
    with enter(Call("student", w=w, step=step)):
        got = wrapped(x)
    torch.testing.assert_close(got, wrapped.base(x) + roles["w"](w) + roles["step"](step))
    with enter(Call("teacher", w=w, step=step)):
        assert torch.equal(wrapped(x), wrapped.base(x))
    assert torch.equal(wrapped(x), wrapped.base(x))


def test_w_is_read_a_thousandfold_and_s_by_the_networks_own_time_map():
    networks = build("copy")
    heard = {}
    for name, embedder in embedders(networks).items():
        embedder.first.register_forward_pre_hook(lambda module, args, name=name: heard.update({name: args[0]}))
    x, t = batch()
    networks["student"](x, t, VALUES)
    torch.testing.assert_close(heard["w"], sinusoid(1000 * VALUES["w"], 64))
    torch.testing.assert_close(heard["s"], sinusoid(networks.teacher.time(VALUES["s"]), 64))
    torch.testing.assert_close(heard["step"], sinusoid(VALUES["step"].float(), 64))


def test_under_another_process_s_is_a_time_of_that_process():
    networks = build("copy", ("s",))
    torch.manual_seed(1)
    nn.init.normal_(embedders(networks)["s"].last.weight, std=0.5)
    x, t = batch()
    s = torch.tensor([0.002, 0.05, 0.3, 2.0])
    view = networks["student"]
    changed = view.under(RectifiedFlow())
    t_rf, factor = view.process.match(changed.process, t)
    s_rf = view.process.match(changed.process, s)[0]
    got = changed(expand(factor, x) * x, t_rf, {"s": s_rf})
    torch.testing.assert_close(got, view(x, t, {"s": s}), rtol=1e-3, atol=1e-4)


def test_an_average_velocity_map_depends_on_its_target_time():
    networks = build("copy", ("s",))
    torch.manual_seed(1)
    nn.init.normal_(embedders(networks)["s"].last.weight, std=0.5)
    f, (x, t) = FlowMap(networks["student"], "average"), batch()
    near, far = (f.average_velocity(x, t, torch.full_like(t, s), {}) for s in (0.009, 0.002))
    assert (near - far).abs().max() > 1e-3


@both_modes
@pytest.mark.parametrize("targets", [None, (r"^time_embedding\.first$", r"\.last$")])
def test_extra_inputs_of_one_role_are_untouched_by_the_adapters_of_another(mode, targets):
    networks = build(mode, targets=targets)
    plain = build(mode, inputs=(), targets=targets)
    counts = [len(run.weights("fake_score")) for run in (networks, plain)]
    assert counts[0] == counts[1]
    names = [name for name, _ in networks.named_weights("student")]
    assert not any("fake_score" in name for name in names)
    inside = sum(len(list(embedder.parameters())) for embedder in embedders(networks).values())
    assert len(names) == len(plain.weights("student")) + inside == len(plain.weights("student")) + 12


def test_an_unknown_input_is_refused():
    with pytest.raises(UserError, match=r"inputs must be among \('w', 's', 'step'\), got \['sigma'\]"):
        build("copy", ("sigma",))


def test_sinusoids_of_a_guidance_scale_tell_its_usual_values_apart():
    features = sinusoid(1000 * torch.tensor([1.0, 1.5, 7.5]), 64)
    distances = torch.cdist(features, features)
    assert distances[distances > 0].min() > math.sqrt(2)


@both_modes
def test_a_network_without_a_place_for_inputs_refuses_them(mode: str) -> None:
    """Left out, the student would be trained without what its method tells it."""
    teacher = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 2, 0, seed=0)
    teacher.embedding_name = None
    roles = {"student": Role(inputs=("s",))}
    with pytest.raises(UserError, match="networks must embed time in one place, to which s of role student"):
        Networks(teacher, roles, (2,), {}, modes={"student": mode}, lora=LoraSpec(4))
    Networks(teacher, {"student": Role()}, (2,), {}, modes={"student": mode}, lora=LoraSpec(4))
