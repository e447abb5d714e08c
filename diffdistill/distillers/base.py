"""The whole contract of a method: Distiller, Phase, Loss, Batch, Transition, and Composite of several methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.generator import Generator
from diffdistill.networks.roles import Networks, Role
from diffdistill.rng import Rng
from diffdistill.solvers import Sampler

NEEDS = frozenset({"x0", "pair", "trajectory", "condition", "null", "codec", "jvp"})


@dataclass(frozen=True)
class Pair:
    """Prior noise z and the teacher's sample x0 from it, [B, *shape] each."""

    z: Tensor
    x0: Tensor
    cond: Cond


@dataclass(frozen=True)
class Trajectory:
    """A state x_t [B, *shape] at t [B] of a teacher trajectory and the (guided, scale w [B]) prediction there."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    w: Tensor
    cond: Cond


@dataclass(frozen=True)
class Batch:
    """What a phase works on. shape: (B, *sample), what data-free methods draw.

    memo shares samples between the phases of one step; it is new at every step.
    """

    cond: Cond
    shape: tuple[int, ...]
    x0: Tensor | None = None
    pair: Pair | None = None
    trajectory: Trajectory | None = None
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """terms: weighted scalars, their sum is minimised.  stats: further scalars to log."""

    terms: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        first, *others = self.terms.values()
        return sum(others, first)


@dataclass(frozen=True)
class Phase:
    """One update: the roles it trains and the loss it minimises."""

    name: str
    trains: tuple[str, ...]
    loss: Callable[[Batch, Rng], Loss]


@dataclass(frozen=True)
class Transition:
    """Changes between steps, executed by the trainer in this order.

    snapshot: (role, name) pairs stored; restore: (name, role) pairs written back; copy: (source, target) roles.
    restart: roles whose optimizer, learning rate and averages begin again.
    """

    copy: tuple[tuple[str, str], ...] = ()
    snapshot: tuple[tuple[str, str], ...] = ()
    restore: tuple[tuple[str, str], ...] = ()
    restart: tuple[str, ...] = ()


class Distiller(ABC):
    """A method. Its constructor takes `networks` and its hyperparameters by name; values live in its YAML."""

    networks: Networks

    @classmethod
    def needs(cls, **hyperparameters: Any) -> frozenset[str]:
        """What it asks of data and teacher, among x0, pair, trajectory, condition, null, codec, jvp."""
        return frozenset()

    @classmethod
    @abstractmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        """Its networks by role name."""

    @abstractmethod
    def phases(self, step: int) -> Sequence[Phase]:
        """The updates of step `step` (0, 1, ...), in order."""

    @property
    @abstractmethod
    def generator(self) -> Sampler:
        """What evaluation samples and export ships."""

    def after_step(self, step: int) -> Transition | None:
        """A transition due after step `step`, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The method's own state (JSON values and tensors), beyond weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


def student_times(networks: Networks, times: Sequence[float] | None) -> tuple[float, ...]:
    """The student's grid: as given, or one step from t_max."""
    return (networks["student"].process.t_max,) if times is None else tuple(float(t) for t in times)


class Composite(Distiller):
    """Several methods on one student: losses weighted and summed in one backward per phase name.

    parts: name -> distiller class with its hyperparameters bound.  weights: name -> factor on that part's terms.
    Roles are united by name; the first part's generator ships. Each part draws from its own stream and sees its own
    memo, so weight 0 is bit-equal to leaving the part out.
    """

    def __init__(
        self, networks: Networks, parts: Mapping[str, partial[Distiller]], weights: Mapping[str, float]
    ) -> None:
        self.networks = networks
        self._check(parts, weights)
        self.parts = {name: part(networks=networks) for name, part in parts.items()}
        self.weights = dict(weights)
        self._active = {name: part for name, part in self.parts.items() if weights[name] != 0}

    @classmethod
    def needs(cls, **hyperparameters: Any) -> frozenset[str]:
        parts: Mapping[str, partial[Distiller]] = hyperparameters["parts"]
        return frozenset().union(*(part.func.needs(**part.keywords) for part in parts.values()))  # type: ignore[attr-defined]

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        united: dict[str, Role] = {}
        for part_name, part in hyperparameters["parts"].items():
            for name, role in part.func.roles(**part.keywords).items():
                if united.setdefault(name, role) != role:
                    raise UserError(
                        f"distiller.parts.{part_name}",
                        f"must define role {name} like the other parts",
                        role,
                        f"The others have {united[name]}.",
                    )
        return united

    def phases(self, step: int) -> Sequence[Phase]:
        due: dict[str, list[tuple[str, Phase]]] = {}
        for name, part in self._active.items():
            for phase in part.phases(step):
                due.setdefault(phase.name, []).append((name, phase))
        return [self._merged(phase_name, group) for phase_name, group in due.items()]

    def _merged(self, phase_name: str, group: list[tuple[str, Phase]]) -> Phase:
        trains = tuple(dict.fromkeys(role for _, phase in group for role in phase.trains))

        def loss(batch: Batch, rng: Rng) -> Loss:
            terms: dict[str, Tensor] = {}
            stats: dict[str, Tensor] = {}
            for name, phase in group:
                memo = batch.memo.setdefault(name, {})
                part = phase.loss(replace(batch, memo=memo), rng)
                weight = self.weights[name]
                terms |= {f"{name}/{key}": weight * value for key, value in part.terms.items()}
                stats |= {f"{name}/{key}": value for key, value in part.stats.items()}
            return Loss(terms, stats)

        return Phase(phase_name, trains, loss)

    @property
    def generator(self) -> Sampler:
        return next(iter(self.parts.values())).generator

    def after_step(self, step: int) -> Transition | None:
        due = [t for part in self._active.values() if (t := part.after_step(step)) is not None]
        if not due:
            return None
        return Transition(
            copy=tuple(x for t in due for x in t.copy),
            snapshot=tuple(x for t in due for x in t.snapshot),
            restore=tuple(x for t in due for x in t.restore),
            restart=tuple(x for t in due for x in t.restart),
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    @staticmethod
    def _check(parts: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        if not parts or set(parts) != set(weights):
            raise UserError(
                "distiller.weights", f"must name exactly the parts {sorted(parts)}", sorted(weights), "Mend the names."
            )
        for name, weight in weights.items():
            if weight < 0:
                raise UserError(f"distiller.weights.{name}", "must be >= 0", weight, "0 leaves the part out.")
        if not any(weights.values()):
            raise UserError("distiller.weights", "must not all be 0", dict(weights), "Give one a positive value.")


__all__ = [
    "Batch",
    "Composite",
    "Cond",
    "Distiller",
    "Generator",
    "Loss",
    "Pair",
    "Phase",
    "Trajectory",
    "Transition",
    "student_times",
]
