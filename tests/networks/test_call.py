"""call: the network call in progress, its dropout, its recomputation and the record of passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffdistill.denoiser import Denoiser, Guidance
from diffdistill.networks.call import Call, checkpointed, current_call, enter, recorded_passes
from diffdistill.networks.lora import LoraLayer, LoraSpec
from diffdistill.networks.mlp import mlp_from_config


def test_calls_nest_and_end_with_their_context_even_after_an_error():
    assert current_call() is None

    def broken():
        with enter(Call("student")):
            assert current_call().role == "student"
            raise RuntimeError("inside")

    with enter(Call("teacher")):
        with pytest.raises(RuntimeError, match="inside"):
            broken()
        assert current_call().role == "teacher"
    assert current_call() is None


def test_a_view_tells_its_network_role_time_and_extra_inputs():
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 1, 0, seed=0)
    heard = []
    network.layers[0].register_forward_hook(lambda *_: heard.append(current_call()))
    t, step, w = torch.tensor([0.1, 1.0]), torch.tensor([0, 3]), torch.tensor([1.0, 2.0])
    Denoiser(network, "student")(torch.zeros(2, 2), t, {"step": step, "w": w})
    assert heard[0].role == "student"
    assert heard[0].t is t
    assert heard[0].step is step
    assert heard[0].w is w
    assert heard[0].s is None


def test_dropout_follows_the_seed_of_the_call_and_leaves_torchs_generator():
    dropout, x = nn.Dropout(0.5), torch.ones(100)

    def under(seed):
        with enter(Call("student", seed=seed)):
            return dropout(x)

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    first = under(1)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(under(1), first)
    assert not torch.equal(under(2), first)


def adapted(roles=("student", "fake_score")):
    torch.manual_seed(0)
    layer = LoraLayer(nn.Linear(4, 4).requires_grad_(False))
    for role in roles:
        layer.add(role, LoraSpec(2))
        nn.init.normal_(layer.up[role].weight, std=0.5)
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputation_re_enters_the_call_of_its_forward_pass(dropout):
    layer, x = adapted(), torch.randn(3, 4)
    block = nn.Sequential(layer, nn.Tanh(), nn.Dropout(dropout), layer)

    def gradients(run):
        layer.zero_grad()
        with enter(Call("student", seed=5)):
            out = run(block, x)
        with enter(Call("fake_score")):  # another role's call is in progress when the backward pass recomputes
            layer(x)
            out.square().sum().backward()
        return (
            out,
            layer.up["student"].weight.grad,
            layer.down["student"].weight.grad,
            layer.up["fake_score"].weight.grad,
        )

    plain = gradients(lambda f, x: f(x))
    again = gradients(checkpointed)
    for got, wanted in zip(again[:3], plain[:3], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert plain[1].abs().max() > 0
    assert again[3] is plain[3] is None


def test_recomputation_works_outside_every_call():
    layer, x = adapted(), torch.randn(3, 4, requires_grad=True)
    checkpointed(layer, x).sum().backward()
    torch.testing.assert_close(x.grad, layer.base.weight.sum(0).expand(3, 4))


def test_passes_record_role_batch_and_where_gradient_goes():
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 2, 3, seed=0)
    teacher = Denoiser(network, "teacher").guided(Guidance(2.0, network.null))
    student = Denoiser(mlp_from_config(0.5, 0.002, 20.0, 2, 16, 2, 3, seed=1), "student")
    network.requires_grad_(False)
    x, t, cond = torch.zeros(5, 2), torch.ones(5), {"label": torch.zeros(5, dtype=torch.long)}
    with recorded_passes() as passes:
        with torch.no_grad():
            student(x, t, cond)
        x0 = student(x, t, cond)
        teacher(x0, t, cond)
        student.features(x0, t, cond, (1,))
    student(x, t, cond)
    assert [(p.role, p.batch, p.backward, p.through_input, p.layers) for p in passes] == [
        ("student", 5, False, False, None),
        ("student", 5, True, False, None),
        ("teacher", 5, True, True, None),
        ("teacher", 5, True, True, None),
        ("student", 5, True, True, (1,)),
    ]


def test_a_call_tells_once_which_of_its_times_lie_above_a_bound():
    call = Call("student", torch.tensor([0.1, 0.5, 0.9]))
    assert call.above(0.5) == (False, False, True)
    assert call.above(0.05) == (True, True, True)
    assert call.above(0.5) is call.above(0.5)
