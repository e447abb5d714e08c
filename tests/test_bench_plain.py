"""The plain loops compute what the methods do, and bytes are counted as by hand."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import bench, bench_plain, bench_step
from diffdistill.bench_memory import Bytes, bytes_of, least_bytes
from diffdistill.bench_passes import Made
from diffdistill.bench_plain import PLAINLY, PlainLoop, why_not
from diffdistill.config import build
from diffdistill.distillers.base import Batch, Phase
from diffdistill.launch import accelerator_of
from diffdistill.recipe import assemble
from diffdistill.rng import Rng
from diffdistill.stand_in import Made as WithMade

METHODS = ("dmd2", "sid", "f_distill", "scm", "mean_flow", "agd")
WORDS = {
    "f_distill": ("distiller.r1_weight=0",),
    "scm": ("distiller.adaptive=true", "distiller.normalise=0.1"),
    "mean_flow": ("distiller.power=0.5",),
}


class SameDraws:
    """The draws of a method's own stream, in the place of torch's."""

    def __init__(self, rng: Rng, dtype: torch.dtype) -> None:
        self.rng, self.dtype = rng, dtype

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return self.rng.normal(shape, self.dtype)

    def uniform(self) -> Tensor:
        return self.rng.uniform((len(self.rng),), torch.float32)

    def times(self, law: Any, process: Any) -> Tensor:
        return law(self.rng, process, torch.float32)


def recipe_of(name: str, *words: str) -> Any:
    pair = bench.Pair(name, "digits", tuple(bench._words(name, "digits", 4, [*WORDS.get(name, ()), *words])))
    settings = pair.settings()
    return assemble({str(key): settings[key] for key in settings}), build(settings["trainer"])


def shaken(recipe: Any) -> Any:
    """Weights apart from each other, so that no difference is zero."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in recipe.networks.trainable:
            for weight in recipe.networks.weights(role):
                weight += 0.02 * torch.randn(weight.shape, generator=draw)
    return recipe


@pytest.mark.parametrize("name", METHODS)
def test_a_plain_loss_is_the_methods(name: str) -> None:
    recipe, trainer = recipe_of(name)
    method, networks = shaken(recipe).distiller, recipe.networks
    assert why_not(method, trainer) is None
    phases = {phase.name: phase for phase in method.phases(0)}
    batch = WithMade(recipe.data).batch(Rng(3, 0, "data", range(4)), 4, recipe.needs, networks.dtype)
    names = dict.fromkeys((("student",), ("student", "weight")), "student")
    updates = list(PLAINLY[type(method)](method, batch, None, 0))  # type: ignore[arg-type]
    assert [set(roles) for roles, _ in updates] == [set(phase.trains) for phase in method.phases(0)]
    for roles, _ in updates:
        phase = phases[names.get(roles, "critic")]
        rng = Rng(3, 0, phase.name, range(4))
        networks.train_only(roles)
        fresh: Batch = WithMade(recipe.data).batch(Rng(3, 0, "data", range(4)), 4, recipe.needs, networks.dtype)
        wanted = phase.loss(fresh, rng).total
        wanted.backward()
        gradients = [[w.grad.clone() for w in networks.weights(role) if w.grad is not None] for role in roles]
        networks.zero_grad()
        draws: Any = SameDraws(Rng(3, 0, phase.name, range(4)).fork(type(method).__name__), networks.dtype)
        again = dict(PLAINLY[type(method)](method, batch, draws, 0))[roles]()
        again.backward()
        torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-6)
        for role, own in zip(roles, gradients, strict=True):
            largest = max(float(g.abs().max()) for g in own)
            for weight, gradient in zip((w for w in networks.weights(role) if w.grad is not None), own, strict=True):
                assert float((weight.grad - gradient).abs().max()) < 1e-4 * largest
        networks.zero_grad()


def test_a_plain_step_trains_each_role_and_leaves_all_as_it_was() -> None:
    recipe, trainer = recipe_of("f_distill", "distiller.r1_weight=0.01")
    recipe = bench_step.replace(recipe, data=WithMade(recipe.data))
    loop = PlainLoop(recipe, trainer, accelerator_of("fp32", cpu=True))
    before = {role: [w.detach().clone() for w in owned] for role, owned in loop.weights.items()}
    loop.step(0)
    assert set(before) == {"student", "fake_score", "discriminator"}
    for role, owned in loop.weights.items():
        moments = [state["exp_avg_sq"] for state in loop.optimizers[role].state.values()]
        assert moments and any(float(moment.abs().max()) > 0 for moment in moments)
        assert all(torch.equal(weight, kept) for weight, kept in zip(owned, before[role], strict=True))
        assert not any(group.get("fused") for group in loop.optimizers[role].param_groups)


@pytest.mark.parametrize(
    ("name", "words", "why"),
    [
        ("dmd2", ("trainer.accumulate=2",), "whole batches"),
        ("dmd2", ("distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1"), "without GAN"),
        ("dmd2", ("distiller.times=[2.5,0.5]",), "one step"),
        ("scm", ("distiller.velocity=data",), "the teacher's velocity"),
        ("kd", (), "KD is not written plainly"),
    ],
)
def test_what_is_not_written_plainly_is_told(name: str, words: tuple[str, ...], why: str) -> None:
    recipe, trainer = recipe_of(name, *words)
    assert why in str(why_not(recipe.distiller, trainer))


def test_times_come_from_their_law() -> None:
    recipe, _ = recipe_of("dmd2")
    draws = bench_plain.Draws(2000, torch.float32, torch.device("cpu"))
    process = recipe.networks["target"].process
    t = draws.times(recipe.distiller.critic_law, process)
    wanted = recipe.distiller.critic_law(Rng(9, 0, "x", range(2000)), process, torch.float32)
    assert t.shape == (2000,)
    for share in (0.1, 0.5, 0.9):
        assert float(t.log().quantile(share)) == pytest.approx(float(wanted.log().quantile(share)), abs=0.25)


# -- bytes ----------------------------------------------------------------------------------------------------


def made(role: str, phase: Phase) -> Made:
    return SimpleNamespace(role=role, phase=phase)  # type: ignore[return-value]


class OwnWeights:
    """Roles of so many float32 weights."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def weights(self, role: str) -> list[Tensor]:
        return [torch.zeros(self.sizes[role])]


def test_the_fewest_bytes_by_hand() -> None:
    networks: Any = OwnWeights(student=10, critic=20)  # 40 and 80 bytes
    student, critic = Phase("student", ("student",), None), Phase("critic", ("critic",), None)  # type: ignore[arg-type]
    passes = [made("student", student), made("target", student), made("critic", critic)]
    needs = [Bytes(forward=300, graph=200, backward=50), Bytes(forward=150, graph=0, backward=0), Bytes(500, 400, 90)]
    stays = [torch.zeros(25)]  # 100 bytes
    assert least_bytes(stays, passes[:2], needs[:2], networks) == 100 + 350  # the target runs beside the graph
    assert least_bytes(stays, passes, needs, networks) == 100 + 500
    heavy = [Bytes(300, 200, 250), needs[1], Bytes(410, 400, 90)]
    assert least_bytes(stays, passes, heavy, networks) == 100 + 490  # the critic's backward pass, beside its graph
    both = Phase("both", ("student", "critic"), None)  # type: ignore[arg-type]
    two = [made("student", both), made("critic", both)]
    found = [Bytes(300, 200, 150), Bytes(10, 5, 80)]
    assert least_bytes([], two, found, networks) == 200 + 80 + 150  # the critic's gradients wait beside the student's
    assert least_bytes([], two, [Bytes(1, 1, 1), Bytes(1, 1, 1)], networks) == 120  # all gradients, at the update


def test_bytes_of_one_layer_by_hand() -> None:
    layer = nn.Linear(64, 32, bias=False)
    x = torch.randn(16, 64)
    phase = Phase("student", ("student",), None)  # type: ignore[arg-type]

    class One:
        teacher = layer

        def train_only(self, names: Any) -> None:
            layer.requires_grad_(True)

        def zero_grad(self) -> None:
            layer.weight.grad = None

    def function(given: Tensor) -> Tensor:
        return layer(given).square()

    one = Made(phase, "student", 16, True, "forward", True, function, (x,), (False,), [])
    accelerator = accelerator_of("fp32", cpu=True)
    out, weights = 16 * 32 * 4, 64 * 32 * 4
    found = bytes_of(one, [layer.weight], One(), accelerator.autocast)  # type: ignore[arg-type]
    assert found == Bytes(forward=2 * out, graph=0, backward=0)  # no graph is needed where no gradient came
    one.reached = True
    found = bytes_of(one, [layer.weight], One(), accelerator.autocast)  # type: ignore[arg-type]
    assert found.graph == 2 * out and found.forward == 2 * out  # the square keeps what it is taken of
    assert weights <= found.backward <= weights + 4 * out


FAULTS = """
import resource
import torch
from diffdistill.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [torch.ones(6 * 2**20) for _ in range(8)]  # 24 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if keep_freed(False):
    given_back = faults()
    keep_freed(True)
    faults()
    print(given_back, faults())
"""


def test_freed_memory_stays_only_where_it_is_asked_to() -> None:
    """Page faults of tensors made and freed again and again, on glibc, in a process without a past."""
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    if not told:
        pytest.skip("another C library")
    given_back, kept = map(int, told.split())
    assert kept < given_back / 5
