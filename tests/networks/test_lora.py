"""lora: adapters on a shared backbone that follow the call in progress."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffdistill import UserError
from diffdistill.networks.call import Call, enter
from diffdistill.networks.lora import LoraLayer, LoraSpec, adapt, merge

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear_tokens": (lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv_1x1": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 8, 8)),
    "conv_3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 8, 8)),
    "conv_strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 8, 8)),
    "conv_dilated": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=2, bias=False), (3, 4, 8, 8)),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def made(kind, roles=("student",), trained=True):
    """A LoraLayer with an adapter for each role and an input; trained: its second factors are not zero."""
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = LoraLayer(build())
    for role in roles:
        layer.add(role, LoraSpec(rank=3, alpha=6.0))
        if trained:
            nn.init.normal_(layer.up[role].weight, std=0.3)
    return layer, torch.randn(shape)


def under(role, layer, x):
    with enter(Call(role)):
        return layer(x)


@layers
def test_a_new_adapter_leaves_the_output_of_the_base_bit_for_bit(kind):
    layer, x = made(kind, trained=False)
    assert torch.equal(under("student", layer, x), layer.base(x))


@layers
def test_a_role_without_adapter_and_no_call_at_all_see_the_base(kind):
    layer, x = made(kind)
    assert torch.equal(under("teacher", layer, x), layer.base(x))
    assert torch.equal(layer(x), layer.base(x))
    assert not torch.allclose(under("student", layer, x), layer.base(x), atol=1e-2)


@layers
def test_the_merged_layer_equals_the_adapter(kind):
    layer, x = made(kind)
    merged = layer.merged("student")
    assert type(merged) is type(layer.base)
    torch.testing.assert_close(merged(x), under("student", layer, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.merged("teacher")(x), layer.base(x))


def test_the_update_is_alpha_over_rank_times_the_product_of_its_factors():
    layer, x = made("linear")
    delta = 6.0 / 3 * layer.up["student"].weight @ layer.down["student"].weight
    torch.testing.assert_close(under("student", layer, x), layer.base(x) + x @ delta.T)


@layers
def test_merging_leaves_the_base_as_it_was(kind):
    layer, _ = made(kind)
    before = layer.base.weight.clone()
    layer.merged("student")
    assert torch.equal(layer.base.weight, before)


def test_two_roles_differ_and_only_the_role_in_progress_gets_a_gradient():
    layer, x = made("linear", ("student", "fake_score"))
    layer.base.requires_grad_(False)
    out = under("student", layer, x)
    assert not torch.allclose(out, under("fake_score", layer, x), atol=1e-2)  # the other role runs last
    out.square().sum().backward()
    assert layer.up["student"].weight.grad.abs().max() > 0
    assert layer.down["student"].weight.grad.abs().max() > 0
    assert layer.up["fake_score"].weight.grad is None
    assert layer.down["fake_score"].weight.grad is None
    assert layer.base.weight.grad is None


def test_adapters_of_a_bfloat16_base_train_in_float32_and_keep_its_output_type():
    torch.manual_seed(0)
    layer = LoraLayer(nn.Linear(6, 5).bfloat16())
    layer.add("student", LoraSpec(rank=2))
    assert layer.down["student"].weight.dtype == torch.float32
    assert under("student", layer, torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


def test_adapters_of_a_float64_base_are_float64():
    layer = LoraLayer(nn.Linear(6, 5).double())
    layer.add("student", LoraSpec(rank=2))
    assert layer.up["student"].weight.dtype == torch.float64


class Net(nn.Module):
    """Linears, convolutions, a grouped convolution and a norm."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.mix = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))

    def forward(self, x):
        return self.mix(self.norm(self.grouped(self.inlet(x))).mean((2, 3)))


def adapted(net, roles, spec=None):
    spec = spec or LoraSpec(rank=2)
    found = {}
    for role in roles:
        found[role] = adapt(net, role, spec)
        for layer in found[role]:
            nn.init.normal_(layer.up[role].weight, std=0.3)
    return found


def test_every_linear_and_ungrouped_convolution_is_adapted_once_for_each_role():
    net = Net()
    found = adapted(net, ("student", "fake_score"))
    wanted = [net.inlet, net.mix[0], net.mix[2]]
    for role in ("student", "fake_score"):
        assert found[role] == wanted
    assert isinstance(net.grouped, nn.Conv2d)
    assert not any(isinstance(inner, LoraLayer) for layer in wanted for inner in list(layer.modules())[1:])


def test_targets_choose_layers_by_regular_expressions_on_their_names():
    net = Net()
    assert adapt(net, "student", LoraSpec(2, targets=(r"mix\.2$", "inlet"))) == [net.inlet, net.mix[2]]
    assert isinstance(net.mix[0], nn.Linear)


def test_a_second_role_is_targeted_by_the_same_names():
    net = Net()
    first = adapt(net, "student", LoraSpec(2, targets=(r"^mix\.\d$",)))
    assert adapt(net, "fake_score", LoraSpec(2, targets=(r"^mix\.\d$",))) == first


def test_targets_that_match_nothing_are_refused_with_names_that_exist():
    with pytest.raises(UserError, match=r"lora.targets must match .*Names: inlet, grouped, mix.0, mix.2"):
        adapt(Net(), "student", LoraSpec(2, targets=("attn",)))


def test_a_rank_below_one_is_refused():
    with pytest.raises(UserError, match="rank must be >= 1, got 0"):
        LoraSpec(rank=0)


def test_merging_a_network_folds_one_role_in_and_drops_the_others():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 2, 8, 8)
    keys = set(net.state_dict())
    adapted(net, ("student", "fake_score"))
    wanted = under("student", net, x)
    merge(net, "student")
    assert not any(isinstance(module, LoraLayer) for module in net.modules())
    assert set(net.state_dict()) == keys
    torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)
