"""distillers.base: a Composite of two toy methods, alone and together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

from diffdistill import UserError
from diffdistill.distillers.base import Batch, Composite, Distiller, Loss, Phase, Transition
from diffdistill.generator import Generator
from diffdistill.networks.mlp import mlp_from_config
from diffdistill.networks.roles import Networks, Role
from diffdistill.rng import Rng


class Pull(Distiller):
    """Pulls the student's output at noise of its own towards `level`."""

    def __init__(self, networks: Networks, level: float, inputs: tuple[str, ...] = ()) -> None:
        self.networks, self.level, self.seen = networks, level, []

    @classmethod
    def needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return frozenset({"x0"})

    @classmethod
    def roles(cls, inputs: tuple[str, ...] = (), **hyperparameters: Any) -> Mapping[str, Role]:
        return {"student": Role(inputs=inputs)}

    def phases(self, step: int) -> list[Phase]:
        return [Phase("student", ("student",), self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        noise = rng.fork("Pull").normal(batch.shape)
        batch.memo["noise"] = noise
        self.seen.append((noise, batch.memo))
        t = torch.ones(batch.shape[0])
        out = self.networks["student"](noise, t, batch.cond)
        return Loss({"pull": (out - self.level).square().mean()}, {"out": out.detach().mean()})

    @property
    def generator(self) -> Generator:
        return Generator(self.networks["student"], (self.level,))

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.level = state["level"]


class Chase(Distiller):
    """A critic follows the student at every step; at every third the student follows the critic."""

    def __init__(self, networks: Networks, gain: float) -> None:
        self.networks, self.gain, self.seen = networks, gain, []

    @classmethod
    def needs(cls, **hyperparameters: Any) -> frozenset[str]:
        return frozenset({"null"})

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"student": Role(), "fake_score": Role(modes=("lora", "copy"))}

    def phases(self, step: int) -> list[Phase]:
        critic = Phase("critic", ("fake_score",), self.critic)
        return [critic, Phase("student", ("student",), self.loss)] if step % 3 == 0 else [critic]

    def gap(self, batch: Batch, rng: Rng, follower: str, leader: str) -> torch.Tensor:
        noise = rng.fork("Chase").normal(batch.shape)
        self.seen.append((noise, batch.memo))
        t = torch.ones(batch.shape[0])
        with torch.no_grad():
            goal = self.networks[leader](noise, t, batch.cond) + self.gain
        return (self.networks[follower](noise, t, batch.cond) - goal).square().mean()

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        return Loss({"chase": self.gap(batch, rng, "student", "fake_score")})

    def critic(self, batch: Batch, rng: Rng) -> Loss:
        batch.memo["noise"] = "the critic's"
        return Loss({"follow": self.gap(batch, rng, "fake_score", "student")}, {"one": torch.ones(())})

    @property
    def generator(self) -> Generator:
        return Generator(self.networks["student"], (self.gain,))

    def after_step(self, step: int) -> Transition | None:
        return Transition(snapshot=(("student", "old"),), restart=("student",)) if step == 4 else None

    def state_dict(self) -> dict[str, Any]:
        return {"gain": self.gain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gain = state["gain"]


PARTS = {"pull": partial(Pull, level=2.0), "chase": partial(Chase, gain=0.5)}


def build(method):
    """A distiller (a partial of its class) on networks of its own."""
    torch.manual_seed(0)
    roles = method.func.roles(**method.keywords)
    networks = Networks(mlp_from_config(0.5, 0.002, 20.0, 2, 8, 1, 3, 0), roles, (2,), {"label": torch.tensor([0])})
    return method(networks=networks)


def composite(pull=1.0, chase=1.0, parts=PARTS):
    return partial(Composite, parts=parts, weights={"pull": pull, "chase": chase})


def batch():
    return Batch({"label": torch.tensor([0, 1, 2, 0])}, (4, 2))


def rng(phase="student", step=0):
    return Rng(0, step, phase, range(4))


def gradient(distiller, role="student", phase="student"):
    """Gradient of one phase at step 0 on the weights of a role."""
    due = next(p for p in distiller.phases(0) if p.name == phase)
    distiller.networks.zero_grad()
    distiller.networks.train_only(due.trains)
    due.loss(batch(), rng(phase)).total.backward()
    return [weight.grad for weight in distiller.networks.weights(role)]


def test_phases_due_at_a_step_are_merged_by_name_in_the_order_they_come():
    distiller = build(composite())
    assert [(p.name, p.trains) for p in distiller.phases(0)] == [("student", ("student",)), ("critic", ("fake_score",))]
    assert [p.name for p in distiller.phases(1)] == ["student", "critic"]
    student = distiller.phases(1)[0].loss(batch(), rng())
    assert set(student.terms) == {"pull/pull"}


def test_the_roles_a_merged_phase_trains_are_united():
    class Both(Pull):
        @classmethod
        def roles(cls, **hyperparameters):
            return {"student": Role(), "weight": Role(init=None, build="scalar")}

        def phases(self, step):
            return [Phase("student", ("weight", "student"), self.loss)]

    parts = {"pull": partial(Pull, level=2.0), "chase": partial(Both, level=1.0)}
    distiller = build(composite(parts=parts))
    assert distiller.phases(0)[0].trains == ("student", "weight")
    assert set(distiller.networks.trainable) == {"student", "weight"}


def test_terms_are_weighted_and_stats_are_not_and_both_carry_their_part():
    alone = {name: build(method) for name, method in PARTS.items()}
    separate = {name: distiller.phases(0)[-1].loss(batch(), rng()) for name, distiller in alone.items()}
    together = build(composite(0.25, 3.0)).phases(0)[0].loss(batch(), rng())
    torch.testing.assert_close(together.terms["pull/pull"], 0.25 * separate["pull"].terms["pull"])
    torch.testing.assert_close(together.terms["chase/chase"], 3.0 * separate["chase"].terms["chase"])
    torch.testing.assert_close(together.stats["pull/out"], separate["pull"].stats["out"])
    torch.testing.assert_close(together.total, sum(together.terms.values()))


def test_the_gradient_of_both_is_the_weighted_sum_of_their_gradients():
    single = [gradient(build(method)) for method in PARTS.values()]
    both = gradient(build(composite(0.25, 3.0)))
    for a, b, total in zip(*single, both, strict=True):
        torch.testing.assert_close(total, 0.25 * a + 3.0 * b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", PARTS)
def test_with_weight_zero_the_other_part_is_bit_for_bit_alone(kept):
    weights = {name: float(name == kept) for name in PARTS}
    distiller, alone = build(composite(**weights)), build(PARTS[kept])
    assert all(torch.equal(a, b) for a, b in zip(gradient(distiller), gradient(alone), strict=True))
    for step in range(4):
        due = [(phase.name, phase.trains) for phase in distiller.phases(step)]
        assert due == [(phase.name, phase.trains) for phase in alone.phases(step)]
        for phase, other in zip(distiller.phases(step), alone.phases(step), strict=True):
            both = [p.loss(batch(), rng(phase.name, step)).total for p in (phase, other)]
            assert torch.equal(*both)


def test_each_part_draws_from_a_stream_of_its_own_that_the_other_does_not_shift():
    distiller = build(composite())
    distiller.phases(0)[0].loss(batch(), rng())
    noises = {name: part.seen[0][0] for name, part in distiller.parts.items()}
    assert not (noises["pull"] == noises["chase"]).any()
    for name, method in PARTS.items():
        alone = build(method)
        alone.phases(0)[-1].loss(batch(), rng())
        assert torch.equal(alone.seen[0][0], noises[name])


def test_each_part_sees_a_memo_of_its_own_that_lasts_over_the_phases_of_a_step():
    distiller = build(composite())
    shared = batch()
    for phase in distiller.phases(0):
        phase.loss(shared, rng(phase.name))
    (_, pull), ((_, first), (_, second)) = distiller.parts["pull"].seen[0], distiller.parts["chase"].seen
    assert first is second
    assert pull is not first
    assert first["noise"] == "the critic's"
    assert torch.is_tensor(pull["noise"])


def test_needs_and_roles_are_united():
    assert Composite.needs(parts=PARTS, weights={}) == {"x0", "null"}
    roles = Composite.roles(parts=PARTS, weights={})
    assert roles == {"student": Role(), "fake_score": Role(modes=("lora", "copy"))}


def test_parts_that_define_a_role_differently_are_refused():
    parts = {"pull": partial(Pull, level=1.0, inputs=("w",)), "chase": PARTS["chase"]}
    with pytest.raises(UserError, match=r"distiller.parts.chase must define role student like the other parts"):
        Composite.roles(parts=parts, weights={})


def test_the_generator_of_the_first_part_ships():
    assert build(composite()).generator.times == (2.0,)
    assert build(composite(parts=dict(reversed(PARTS.items())))).generator.times == (0.5,)


def test_state_is_nested_by_part():
    distiller = build(composite())
    assert distiller.state_dict() == {"pull": {"level": 2.0}, "chase": {"gain": 0.5}}
    distiller.load_state_dict({"pull": {"level": 7.0}, "chase": {"gain": 8.0}})
    assert (distiller.parts["pull"].level, distiller.parts["chase"].gain) == (7.0, 8.0)


def test_transitions_of_all_parts_are_carried_out():
    parts = {"pull": PARTS["chase"], "chase": PARTS["chase"]}
    distiller = build(composite(parts=parts))
    assert distiller.after_step(3) is None
    assert distiller.after_step(4) == Transition(snapshot=(("student", "old"),) * 2, restart=("student", "student"))


def test_a_composite_may_be_a_part():
    inner = partial(Composite, parts=PARTS, weights={"pull": 0.5, "chase": 2.0})
    outer = partial(Composite, parts={"inner": inner}, weights={"inner": 3.0})
    terms = build(outer).phases(0)[0].loss(batch(), rng()).terms
    flat = build(composite(1.5, 6.0)).phases(0)[0].loss(batch(), rng()).terms
    torch.testing.assert_close(terms["inner/pull/pull"], flat["pull/pull"])
    torch.testing.assert_close(terms["inner/chase/chase"], flat["chase/chase"])


@pytest.mark.parametrize("weights", [{"pull": 1.0}, {"pull": 1.0, "chase": 1.0, "other": 1.0}])
def test_weights_must_name_exactly_the_parts(weights):
    with pytest.raises(UserError, match=r"distiller.weights must name exactly the parts \['chase', 'pull'\]"):
        build(partial(Composite, parts=PARTS, weights=weights))


@pytest.mark.parametrize(
    ("pull", "chase", "message"),
    [(0.0, 0.0, "distiller.weights must not all be 0"), (-1.0, 2.0, r"distiller.weights.pull must be >= 0, got -1")],
)
def test_weights_must_not_be_negative_or_all_zero(pull, chase, message):
    with pytest.raises(UserError, match=message):
        build(composite(pull, chase))


def test_the_total_of_a_loss_is_the_sum_of_its_terms():
    assert float(Loss({"a": torch.tensor(1.0), "b": torch.tensor(2.5)}).total) == 3.5


def test_every_batch_has_a_memo_of_its_own():
    assert batch().memo is not batch().memo
