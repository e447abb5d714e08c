"""A derivative by forward mode and a gradient from one pass: the same numbers as from two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.autodiff import CentralDifference, Exact, jvp, moves
from diffdistill.config import compose
from diffdistill.networks.attention import Sdpa
from diffdistill.networks.call import recorded_passes, seen_calls
from diffdistill.recipe import assemble
from diffdistill.rng import Rng

SMALL = ("trainer.batch_size=4", "evaluation=none", "run_dir=none", "stages={}", "init={}")
LORA = ("roles.student=lora", "lora.rank=2")


def the_loss(recipe: Any, one_pass: bool) -> Tensor:
    """Of the student's phase on one batch, one step into training, with the passes that a run would make."""
    networks = recipe.networks
    networks.checkpointed = not one_pass
    networks.train_only(("student",))
    networks.zero_grad()
    rng = Rng(1, 3, "student", range(4))
    batch = recipe.data.batch(Rng(1, 0, "data", range(4)), 4, recipe.needs, networks.dtype)
    rng.seed_torch()
    loss: Tensor = recipe.distiller.phases(3)[0].loss(batch, rng).total
    return loss


def loss_and_gradients(recipe: Any, one_pass: bool) -> tuple[Tensor, list[Tensor]]:
    loss = the_loss(recipe, one_pass)
    loss.backward()
    weights = recipe.networks.weights("student")
    return loss.detach(), [weight.grad.clone() for weight in weights if weight.grad is not None]


def shaken(recipe: Any) -> Any:
    """The recipe with weights that are nobody's start: adapters begin at zero, and students as their teacher."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in recipe.networks.weights("student"):
            weight += 0.02 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
    return recipe


CASES: dict[str, tuple[str, ...]] = {
    "scm": ("experiment=digits_scm",),
    "scm by adapters": ("experiment=digits_scm", *LORA),
    "sct": ("experiment=digits_sct",),
    "tbcm": ("experiment=digits_tbcm",),
    "mean_flow": ("experiment=digits_mean_flow",),
    "scm by differences": ("experiment=digits_scm", "distiller/tangent=difference"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_pass_gives_the_losses_and_gradients_of_two(name: str) -> None:
    settings = compose("train", [*CASES[name], *SMALL])
    recipe = shaken(assemble({str(key): settings[key] for key in settings}))
    loss, gradients = loss_and_gradients(recipe, True)
    wanted_loss, wanted = loss_and_gradients(recipe, False)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=1e-5)
    assert len(gradients) == len(wanted) > 5
    largest = max(float(w.abs().max()) for w in wanted)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert float((gradient - other).abs().max()) < 1e-4 * largest
    assert largest > 1e-4


def passes(one_pass: bool) -> list[str]:
    settings = compose("train", ["experiment=digits_scm", *SMALL])
    recipe = assemble({str(key): settings[key] for key in settings})
    with recorded_passes() as noted:
        loss_and_gradients(recipe, one_pass)
    return [f"{p.role}{' jvp' * p.jvp}{' graph' * p.backward}" for p in noted]


def test_it_is_one_call_unless_blocks_repeat_themselves() -> None:
    assert passes(True) == ["target", "student jvp graph"]
    assert passes(False) == ["target", "student jvp", "student graph"]


def test_checkpointing_keeps_the_passes_apart() -> None:
    settings = compose("train", ["experiment=digits_scm", "checkpointing=true", *SMALL])
    networks = assemble({str(key): settings[key] for key in settings}).networks
    assert not networks.one_pass
    networks.checkpointed = False
    assert networks.one_pass


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_call_with_the_gradient_is_seen_with_its_graph(one_pass: bool) -> None:
    settings = compose("train", ["experiment=digits_scm", *SMALL])
    recipe = assemble({str(key): settings[key] for key in settings})
    reached: list[float] = []
    with seen_calls() as calls:
        loss = the_loss(recipe, one_pass)
    (call,) = [call for call in calls if call.role == "student"]
    assert call.out.requires_grad and call.x.shape == call.out.shape and call.t.shape == (4,)
    assert not moves(call.x + call.out)
    call.out.register_hook(lambda gradient: reached.append(float(gradient.abs().max())))
    loss.backward()
    assert len(reached) == 1 and reached[0] > 0


def layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.GELU(),
        torch.nn.Dropout(0.3), torch.nn.Linear(8, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("tangent", [Exact(), CentralDifference(1e-4)], ids=["exact", "differences"])
def test_value_derivative_and_dropout_are_those_of_calls_apart(tangent: Any) -> None:
    network = layers()
    x, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = []
    for one_pass in (True, False):
        torch.manual_seed(1)
        value, along = tangent(network, (x,), (v,), one_pass)
        gradients = torch.autograd.grad(value.square().sum() + (value * along).sum(), list(network.parameters()))
        assert value.requires_grad and not along.requires_grad
        found.append([value.detach(), along, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    torch.manual_seed(1)
    with torch.no_grad():
        wanted = torch.func.jvp(network, (x,), (v,))
    torch.testing.assert_close(found[0][1], wanted[1], rtol=1e-6, atol=1e-6)


def test_without_gradients_there_is_no_graph() -> None:
    network, x = layers().eval(), torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        value, along = Exact()(network, (x,), (x,), True)
    assert not value.requires_grad and not along.requires_grad
    assert not jvp(network, (x,), (x,))[0].requires_grad


@pytest.mark.parametrize("moving", ["query", "all"])
def test_attention_keeps_its_graph_and_has_torchs_tangent(moving: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v, dq, dk, dv = (torch.randn(2, 3, 6, 4, generator=draw, dtype=torch.float64) for _ in range(6))
    weight = torch.randn(4, 4, generator=draw, dtype=torch.float64, requires_grad=True)

    def attend(*operands: Tensor) -> Tensor:
        q_, k_, v_ = operands if len(operands) == 3 else (operands[0], k, v)
        return torch.nn.functional.scaled_dot_product_attention(q_ @ weight, k_ @ weight, v_ @ weight, scale=0.3)

    primals, tangents = ((q,), (dq,)) if moving == "query" else ((q, k, v), (dq, dk, dv))
    value, along = jvp(attend, primals, tangents, graph=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted_value, wanted = torch.func.jvp(attend, primals, tangents)
    torch.testing.assert_close((value, along), (wanted_value, wanted.detach()))
    torch.testing.assert_close(
        torch.autograd.grad(value.square().sum(), weight), torch.autograd.grad(attend(*primals).square().sum(), weight)
    )


class Kernels(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_that_is_asked_to_be_unfused_is(fused: bool) -> None:
    attend, weight = Sdpa(fused), torch.ones(1, requires_grad=True)
    x = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    with Kernels() as ran:
        value, along = jvp(lambda q: attend(q * weight, q, q), (x,), (x,), graph=True)
    assert any("flash_attention" in name for name in ran.names) == fused
    wanted, tangent = jvp(lambda q: Sdpa(False)(q * weight.detach(), q, q), (x,), (x,))
    torch.testing.assert_close((value.detach(), along), (wanted, tangent))
