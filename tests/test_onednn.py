"""Linear layers by oneDNN give what torch's own give, where gradients and derivatives are asked for too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_channels_last import losses_and_gradients, recipe_of
from test_one_pass import shaken
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill import onednn
from diffdistill.autodiff import jvp
from diffdistill.errors import UserError
from diffdistill.onednn import OneDnnLinear, by_onednn, product


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the tests' size count as large enough."""
    monkeypatch.setattr(onednn, "LEAST", 1)


class Asked(TorchDispatchMode):
    """Counts the calls of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.diffdistill.linear.default
        return func(*args, **(kwargs or {}))


def layers(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """torch's own, and its copy by oneDNN."""
    torch.manual_seed(0)
    own = nn.Linear(24, 40, bias=bias)
    other = nn.Linear(24, 40, bias=bias)
    other.load_state_dict(own.state_dict())
    by_onednn(other)
    assert isinstance(other, OneDnnLinear)
    return own, other


def inputs() -> Iterator[Tensor]:
    torch.manual_seed(1)
    yield torch.randn(7, 24)
    yield torch.randn(2, 3, 5, 24)
    yield torch.randn(24, 7).t()
    yield torch.randn(2, 24, 5).transpose(1, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", inputs(), ids=["rows", "four dimensions", "transposed", "channels first"])
@pytest.mark.parametrize("frozen", ["", "weight", "input"])
def test_values_and_gradients_are_torchs(any_size: None, x: Tensor, bias: bool, frozen: str) -> None:
    found = []
    for layer in layers(bias):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(frozen != "input")
        layer.weight.requires_grad_(frozen != "weight")
        out = layer(leaf)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        gradients = [leaf.grad, *(weight.grad for weight in layer.parameters())]
        found.append([out.detach(), *(one for one in gradients if one is not None)])
    assert len(found[0]) == len(found[1])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_a_gradient_is_torchs(any_size: None) -> None:
    found = []
    for layer in layers():
        x = next(inputs()).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, layer.weight]))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_for_gradients_that_nobody_asks_for(any_size: None) -> None:
    _, layer = layers()
    x = next(inputs())

    def kept(x: Tensor) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def note(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x)
        return shapes

    assert kept(x) == [(7, 24)]
    layer.requires_grad_(False)
    assert kept(x.requires_grad_()) == [(40, 24)]


def test_what_is_small_or_of_another_kind_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(layer: nn.Module, x: Tensor) -> int:
        with torch.no_grad(), Asked() as asked:
            layer(x)
        return asked.calls

    _, layer = layers()
    x = next(inputs())
    assert calls(layer, x) == 0
    monkeypatch.setattr(onednn, "LEAST", 7 * 24 * 40)
    assert calls(layer, x) == 1
    assert calls(layer, x[:6]) == 0
    assert calls(layer.double(), x.double()) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(layer.float(), x) == 0
    assert calls(layer.to("meta"), x.to("meta")) == 0


@pytest.mark.parametrize("graph", [False, True])
def test_derivatives_are_torchs(any_size: None, graph: bool) -> None:
    """An operator of torch.library has no forward rule: its tangent would be zero, and nobody told."""
    found = []
    for layer in layers():
        x, direction = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)), torch.ones(5, 24)
        with Asked() as asked:
            value, tangent = jvp(lambda x, layer=layer: F.silu(layer(F.silu(x))), (x,), (direction,), graph=graph)
        assert asked.calls == 2 * isinstance(layer, OneDnnLinear)
        gradient = [torch.autograd.grad(value.square().sum(), layer.weight)[0]] if graph else []
        assert tangent.abs().min() > 0
        found.append([value.detach(), tangent, *gradient])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-5)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "a tangent": lambda layer, x: torch.func.jvp(layer, (x,), (torch.ones_like(x),)),
    "a derivative of a derivative": lambda layer, x: jvp(
        lambda x: jvp(lambda y: layer(y).sin(), (x,), (x,))[1], (x,), (x,)
    ),
    "a gradient": lambda layer, x: torch.func.grad(lambda x: layer(x).square().sum())(x),
    "a map": lambda layer, x: torch.func.vmap(layer)(x.expand(3, *x.shape)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_within_transforms_it_is_torchs_own_layer(any_size: None, name: str) -> None:
    own, other = (TRANSFORMS[name](layer, next(inputs())) for layer in layers())
    torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-5)


METHODS = {
    "dmd2": ("experiment=digits_dmd2", "roles.fake_score=lora", "lora.rank=2"),
    "sid": ("experiment=digits_sid",),
    "scm": ("experiment=digits_scm",),
    "mean_flow": ("experiment=digits_mean_flow",),
}


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_the_same_up_to_rounding(any_size: None, name: str) -> None:
    words = METHODS[name]
    with Asked() as asked:
        found = losses_and_gradients(shaken(recipe_of("onednn=true", *words)))
    assert asked.calls > 10
    with Asked() as asked:
        wanted = losses_and_gradients(shaken(recipe_of(*words)))
    assert asked.calls == 0
    largest = max(float(w.abs().max()) for w in wanted)
    assert largest > 1e-3
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-4 * largest


def test_weights_keep_their_names_and_every_plain_layer_is_changed(any_size: None) -> None:
    networks = recipe_of("experiment=digits_dmd2", "onednn=true").networks
    plain = recipe_of("experiment=digits_dmd2").networks
    assert networks.state("student").keys() == plain.state("student").keys()
    kinds = {
        type(m) for m in networks["student"].network.modules() if isinstance(m, nn.Linear)
    }  # those with a rule of their own are left
    assert OneDnnLinear in kinds and nn.Linear not in kinds


def test_compiled_code_has_the_operator_and_no_break(any_size: None) -> None:
    own, other = layers()
    targets: list[str] = []

    def noted(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return lookup_backend("aot_eager")(graph, example)

    x = next(inputs())
    found = torch.compile(other, backend=noted, fullgraph=True)(x)
    assert any("diffdistill" in target for target in targets)
    torch.testing.assert_close(found, own(x), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    torch.testing.assert_close(other.weight.grad, x.sum(0).expand(40, 24), rtol=1e-5, atol=1e-5)


def test_a_torch_without_onednn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UserError, match="built with oneDNN"):
        by_onednn(nn.Linear(2, 2))


def test_the_fake_operator_and_its_derivative_keep_torchs_rules() -> None:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 4), (5, 4), (5,)))
    torch.library.opcheck(product, (x, weight, bias))
