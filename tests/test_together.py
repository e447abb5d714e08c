"""together=true: fewer network calls, and the losses, gradients and figures of as many calls as there are questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from health_runs import watched
from test_bench import benched
from tiny_families import TINY
from torch import Tensor, nn

from diffdistill.bench_passes import answered
from diffdistill.config import build, compose
from diffdistill.denoiser import Denoiser, Guidance, denoised
from diffdistill.errors import UserError
from diffdistill.latents import write
from diffdistill.networks.attention import math, set_attention
from diffdistill.networks.call import Call, current_call, enter, recorded_passes, seen_calls
from diffdistill.networks.joined import answers
from diffdistill.networks.mlp import mlp_from_config
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import RectifiedFlow
from diffdistill.recipe import Recipe, assemble_parts
from diffdistill.rng import Rng

LORA = ("roles.fake_score=lora",)
BATCH = 3


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny PixArt, with prompts of various lengths."""
    place, tiny = tmp_path_factory.mktemp("latents") / "set", TINY["pixart"]
    source = torch.Generator().manual_seed(0)
    write(place, torch.randn(8, *tiny.shape, generator=source), tiny.conditions(8), tiny.conditions(1), "nowhere")
    return place


def recipe_of(words: Sequence[str], latents: Path) -> Recipe:
    """In float64. The transformer is the tiny PixArt."""
    common = ["evaluation=none", "run_dir=none", "experiment=none", *words]
    if "data=latents" in words:
        settings: Any = compose("train", [f"data.path={latents}", "networks=pixart", "networks.path=nowhere", *common])
        teacher: Any = TINY["pixart"].network()
    else:
        settings = compose("train", common)
        teacher = build(settings["networks"])
    return assemble_parts(settings, build(settings["data"]), teacher.double())


def trained(networks: Networks) -> None:
    """Move every weight that trains, so that no update is zero."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in networks.trainable:
            for weight in networks.weights(role):
                weight.add_(0.05 * torch.randn(weight.shape, generator=source, dtype=weight.dtype))


def step_of(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The losses and gradients of a step with all phases, and its calls: role and batch."""
    networks, found, calls = recipe.networks, {}, {}
    for phase in recipe.distiller.phases(0):
        networks.train_only(phase.trains)
        batch = recipe.data.batch(Rng(0, 0, "data", range(BATCH)), BATCH, recipe.needs, torch.float64)
        torch.manual_seed(0)  # a DiT in training drops labels
        with recorded_passes() as passes:
            loss = phase.loss(batch, Rng(0, 0, phase.name, range(BATCH)))
        loss.total.backward()
        calls[phase.name] = [f"{done.role} {done.batch}" for done in passes if done.layers is None]
        found |= {f"{phase.name}/{name}": term.detach() for name, term in loss.terms.items()}
        for role in phase.trains:
            for index, weight in enumerate(networks.weights(role)):
                if weight.grad is not None:
                    found[f"{phase.name}/{role}/{index}"] = weight.grad.clone()
        networks.zero_grad()
    return found, calls


GUIDED = "guidance.scale=2.5"
GAN = ("distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1")
# the calls of the student's phase, alone and together: the student's own and those of the two scores
CASES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "dmd2 lora": (("distiller=dmd2", *LORA), 3, 2),
    "dmd2 lora guided": (("distiller=dmd2", *LORA, GUIDED), 4, 2),
    "dmd2 copies": (("distiller=dmd2",), 3, 3),
    "dmd2 copies guided": (("distiller=dmd2", GUIDED), 4, 3),
    "dmd2 all lora": (("distiller=dmd2", *LORA, "roles.student=lora", GUIDED), 4, 2),
    "sid lora": (("distiller=sid", *LORA), 3, 2),
    "sid lora guided": (("distiller=sid", *LORA, GUIDED), 4, 2),
    "sid copies guided": (("distiller=sid", GUIDED), 4, 3),
    "vsd guided": (("distiller=vsd", GUIDED), 5, 2),
    "vsd copies guided": (("distiller=vsd", "roles.fake_score=copy", GUIDED), 5, 3),
    "f_distill lora": (("distiller=f_distill", *LORA, GUIDED, *GAN), 4, 2),
    "sida lora": (("distiller=sida", *LORA, GUIDED), 4, 2),
    "uni_instruct lora": (("distiller=uni_instruct", *LORA), 3, 2),
    "sid_lsg lora": (("distiller=sid_lsg", *LORA, GUIDED, "distiller.projection_scale=3"), 7, 2),
    "tdm lora": (("distiller=tdm", *LORA, GUIDED), 4, 2),
}
DATA = {"mlp": "gmm2d", "unet": "digits", "transformer": "latents"}


@pytest.mark.parametrize("network", DATA)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_separate_calls(case: str, network: str, latents: Path) -> None:
    words, alone, joined = CASES[case]
    found = []
    for together in (False, True):
        recipe = recipe_of([f"data={DATA[network]}", *words, f"together={together}"], latents)
        trained(recipe.networks)
        found.append(step_of(recipe))
    (wanted, before), (got, after) = found
    assert got.keys() == wanted.keys() and sum(value.abs().sum() > 0 for value in wanted.values()) > 3
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12 * max(1, float(value.abs().max())))
    assert len(before["student"]) in (alone, alone + 1)  # a rollout of two steps has one more
    assert len(before["student"]) - len(after["student"]) == alone - joined
    assert sum(int(call.split()[1]) for call in after["student"]) == len(before["student"]) * BATCH
    if "lora" in case:
        assert f"target+fake_score {BATCH * (alone - 1)}" in after["student"]


def networks_of(family: str, together: bool) -> Networks:
    """A teacher, a fake score with a LoRA and an extra input, and a student with adapters, over one backbone."""
    tiny = TINY[family]
    teacher = tiny.network().double()
    teacher.null = {key: value.double() if value.is_floating_point() else value for key, value in null_of(tiny).items()}
    roles = {
        "target": Role(trainable=False),
        "fake_score": Role(inputs=("step",) if teacher.embedding_name else (), modes=("lora",)),
        "student": Role(inputs=("w",), modes=("adapter",)),
    }
    cond = {key: value[:1] for key, value in conditions(tiny).items()}
    torch.manual_seed(0)
    networks = Networks(teacher, roles, tiny.shape, cond, guidance_scale=2.0, together=together)
    for role in networks.owned:
        networks.module(role).double()
    trained(networks)
    return networks


def conditions(tiny: Any, seed: int = 1) -> dict[str, Tensor]:
    found = tiny.conditions(BATCH, seed)
    return {key: value.double() if value.is_floating_point() else value for key, value in found.items()}


def null_of(tiny: Any) -> dict[str, Tensor]:
    return {key: value[-1:] for key, value in conditions(tiny, seed=2).items()}


@pytest.mark.parametrize("family", TINY)
def test_roles_of_every_family_share_a_call_at_states_times_and_conditions_of_their_own(family: str) -> None:
    tiny, roles = TINY[family], ("target", "fake_score", "student", "target", "fake_score")
    source = torch.Generator().manual_seed(0)
    states = torch.randn(len(roles), BATCH, *tiny.shape, generator=source, dtype=torch.float64)
    shares = torch.rand(len(roles), BATCH, generator=source, dtype=torch.float64)
    extra = [{"step": torch.arange(BATCH) + 2.0 * i, "w": 1 + torch.arange(BATCH).double() * i} for i in range(5)]
    found = []
    for together in (False, True):
        networks = networks_of(family, together)
        process = networks["target"].process
        times = process.t_min + (0.05 + 0.9 * shares) * (process.t_max - process.t_min)
        x = states.clone().requires_grad_()
        questions = [
            question
            for i, role in enumerate(roles)
            for question in networks[role]._questions(x[i], times[i], {**conditions(tiny, seed=i), **extra[i]})
        ]
        with recorded_passes() as passes:
            out = answers(questions)
        (slope,) = torch.autograd.grad(sum((i + 1.0) * one.square().sum() for i, one in enumerate(out)), x)
        assert [done.batch for done in passes] == ([7 * BATCH] if together else [BATCH] * 7)
        assert passes[0].role == ("target+fake_score+student" if together else "target")
        found.append([*out, slope])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10 * float(one.detach().abs().max()))


# -- what watchers are told -------------------------------------------------------------------------------------


def mlp_networks(together: bool = True) -> Networks:
    roles = {"target": Role(trainable=False), "fake_score": Role(modes=("lora",))}
    network = mlp_from_config(0.5, 0.002, 20.0, 2, 16, 3, 3, seed=0)
    torch.manual_seed(0)
    networks = Networks(network, roles, (2,), {"label": torch.tensor([0])}, guidance_scale=2.0, together=together)
    trained(networks)
    return networks


X, T, COND = (
    torch.randn(4, 2, generator=torch.Generator().manual_seed(1)),
    torch.ones(4),
    {"label": torch.arange(4) % 3},
)


def test_each_question_of_a_shared_call_is_seen_and_what_is_seen_carries_the_gradient() -> None:
    seen = []
    for together in (False, True):
        networks, x = mlp_networks(together), X.clone().requires_grad_()
        with seen_calls() as calls:
            d_target, d_fake = denoised((networks["target"], networks["fake_score"]), x, T, COND)
        (slope,) = torch.autograd.grad((d_target + d_fake).square().sum(), [calls[1].out], retain_graph=True)
        seen.append([[call.role, call.t, call.cond["label"], call.out.detach()] for call in calls] + [[slope]])
        assert all(call.out.requires_grad and call.network is networks.teacher for call in calls)
    assert [one[0] for one in seen[0][:3]] == [one[0] for one in seen[1][:3]] == ["target", "target", "fake_score"]
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(other[1:], one[1:])
    torch.testing.assert_close(seen[1][3], seen[0][3])


def test_blocks_are_recorded_by_role_and_question() -> None:
    found = []
    for together in (False, True):
        networks = mlp_networks(together)
        fake = networks["fake_score"].guided(networks["target"].guidance)
        with fake.record((0, 2)) as ours, networks["target"].record((1,)) as theirs, recorded_passes() as passes:
            denoised((networks["target"], fake), X, T, COND)
        assert len(passes) == (1 if together else 4)
        found.append([*ours[0], *ours[2], *theirs[1]])
    assert len(found[1]) == 6
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["dmd2", "sida"])
def test_a_shared_pass_is_timed_alone_and_answered_in_its_place(name: str) -> None:
    bench = benched(name, *LORA, GUIDED, "together=true")
    made = next(made for made in bench.passes if made.role == "target+fake_score")
    assert made.batch == 12 and len(made.answers) == 3
    for one, other in zip(made.forward(), made.answers, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-5, atol=1e-6)
    bench.round()
    with answered(bench.passes), recorded_passes() as noted:
        for step in range(bench.length):
            (batch,) = bench._batches(step)
            for phase in bench.distiller.phases(step):
                bench.networks.train_only(phase.trains)
                phase.loss(batch, bench.trainer.rng(step, phase.name, 0, bench.networks.device)).total.backward()
    assert len(noted) == len(bench.passes)


def test_health_measures_the_same() -> None:
    courses = []
    for together in (False, True):
        words = ["data=gmm2d", "experiment=none", "distiller=dmd2", *LORA, GUIDED, "trainer.steps=20",
                 "evaluation=none", "trainer.batch_size=32", f"together={together}"]  # fmt: skip
        course, _, _ = watched(words, 10)
        courses.append(course)
    (plain, joined) = ([{k: v for k, v in line.items() if k.startswith("health/")} for line in course.lines]
                       for course in courses)  # fmt: skip
    assert any("health/lag/fake_score" in line for line in plain)
    for one, other in zip(plain, joined, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


# -- what shares no call ----------------------------------------------------------------------------------------


def calls_of(*denoisers: Denoiser, cond: dict[str, Tensor] = COND) -> int:
    with recorded_passes() as passes:
        denoised(denoisers, X, T, cond)
    return len(passes)


def test_only_views_over_one_network_in_evaluation_mode_share_a_call() -> None:
    networks = mlp_networks()
    target, fake = networks["target"], networks["fake_score"]
    assert calls_of(target, fake) == 1
    assert calls_of(target, replace(fake, together=False)) == 2
    assert calls_of(target, replace(fake, network=mlp_from_config(0.5, 0.002, 20.0, 2, 16, 3, 3, seed=0))) == 2
    flow = RectifiedFlow()
    assert calls_of(target.under(flow), fake.under(flow).under(fake.process)) == 1  # one network, other processes
    networks.teacher.train()
    assert calls_of(target, fake) == 3


def test_conditions_of_other_shapes_share_no_call() -> None:
    tiny = TINY["sd15"]
    longer = torch.randn(1, 2 * tiny.cond["text"][0], tiny.cond["text"][1])
    view = Denoiser(tiny.network().eval(), together=True)
    x, t, cond = torch.randn(2, *tiny.shape), torch.tensor([10.0, 500.0]), tiny.conditions(2)
    for null, calls in ((longer, 2), (longer[:, : tiny.cond["text"][0]], 1)):
        with recorded_passes() as passes, torch.no_grad():
            view.guided(Guidance(2.0, {"text": null}))(x, t, cond)
        assert len(passes) == calls


def test_dropout_of_a_network_in_training_is_drawn_by_each_question() -> None:
    class Dropping(nn.Module):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network_, self.drop = network, nn.Dropout(0.5)
            self.process, self.kind, self.blocks = network.process, network.kind, network.blocks
            self.scale, self.time = network.scale, network.time

        def forward(self, x: Tensor, t_net: Tensor, cond: Any) -> Tensor:
            return self.network_(self.drop(x), t_net, cond)

    network: Any = Dropping(mlp_from_config(0.5, 0.002, 20.0, 2, 16, 3, 3, seed=0))
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        view = Denoiser(network, together=together).guided(Guidance(2.0, {"label": torch.tensor([3])}))
        found.append(view(X, T, COND))
    assert torch.equal(*found)


# -- inside a shared call ---------------------------------------------------------------------------------------


def shared(first: int, second: int) -> Call:
    t = torch.linspace(0, 1, first + second)
    parts = (Call("target", t[:first]), Call("fake_score", t[first:]))
    return Call("target+fake_score", t, parts=parts)


def test_rows_of_a_part_follow_its_samples_however_many_rows_each_has() -> None:
    call = shared(4, 2)
    assert [(part.role, rows) for part, rows in call.rows(18)] == [
        ("target", slice(0, 12)),
        ("fake_score", slice(12, 18)),
    ]
    assert call.above(0.5) == (False, False, False, True, True, True)
    x = torch.arange(6.0)
    assert torch.equal(call.of("fake_score", x)[0], x[4:]) and call.of("student", x) == []
    twice = replace(call, parts=(replace(call.parts[0], questions=2), call.parts[1]))
    assert [list(piece) for piece in twice.of("target", x)] == [[0, 1], [2, 3]]
    for length in (1, 9):
        with pytest.raises(UserError, match="together needs a network whose layers see every sample"):
            call.rows(length)


def test_each_part_attends_by_its_roles_attention() -> None:
    class Noted:
        cross = True

        def __init__(self, factor: float) -> None:
            self.factor = factor
            self.seen: list[Any] = []

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: Any = None, layout: Any = None, mask: Any = None):
            call = current_call()
            assert call is not None and call.t is not None
            self.seen.append((call.role, len(call.t), len(q)))
            return self.factor * math(q, k, v, scale=scale, mask=mask)

        def ready(self) -> None:
            pass

        def explain(self) -> str:
            return "noted"

    model = TINY["dit"].model().double()
    attention = Noted(0.5)
    set_attention(model, attention, roles=("fake_score",))
    x = torch.randn(6, *TINY["dit"].shape, dtype=torch.float64)
    t, label = torch.linspace(0, 1, 6), torch.arange(6) % 3

    def out(call: Call, rows: slice) -> Tensor:
        with enter(call):
            return model(x[rows], t[rows], class_labels=label[rows]).sample

    call = shared(4, 2)
    got = out(call, slice(0, 6))
    assert attention.seen and set(attention.seen) == {("fake_score", 2, 2)}
    wanted = torch.cat([out(part, rows) for part, rows in call.rows(6)])
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(wanted[4:], out(call.parts[0], slice(4, 6)), atol=1e-6)


def test_a_shared_call_compiles_to_one_graph() -> None:
    networks = mlp_networks()
    views = networks["target"], networks["fake_score"]
    wanted = denoised(views, X, T, COND)
    networks.teacher.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(denoised(views, X, T, COND), wanted)
