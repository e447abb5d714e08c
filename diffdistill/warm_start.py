"""`init.<role>=run:DIR`: a role starts from the weights of another run, or of two, instead of the teacher's.

run:A+run:B          (1 - w) A + w B with w = .5, as SwiftBrush v2 merges two students (arXiv:2408.14176)
run:A+0.3*run:B      w = .3; 0 is A and 1 is B, bit for bit
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.networks.lora import base_state
from diffdistill.networks.roles import Networks

Find = Callable[[str, str], Networks]  # (key, run:DIR or stage:NAME) -> networks with averaged weights
# Between two sources; a folder's own name may hold + and *. No comma: on a command line that is a sweep.
_PLUS = re.compile(r"\+(?:([^+*:]*)\*)?(?=(?:run|stage):)")


@dataclass(frozen=True)
class Source:
    """where: run:DIR or stage:NAME.  role: of that run, empty for the one of the same name."""

    where: str
    role: str


def parse(key: str, text: str) -> tuple[tuple[Source, ...], float]:
    """One or two sources and the share of the second; UserError, naming `key`, if `text` says something else."""
    places, shares = _PLUS.split(text)[::2], _PLUS.split(text)[1::2]
    sources = tuple(Source(where, role) for where, _, role in (place.partition("@") for place in places))
    if not all(re.match(r"(run|stage):.", source.where) for source in sources):
        raise UserError(key, "must be run:DIR or stage:NAME", text, f"Write for example {key}=run:runs/x.")
    if len(sources) > 2:
        raise UserError(key, "must mix two sources at most", text, "Leave out the others.")
    return sources, _share(key, shares[0]) if shares else 1.0


def _share(key: str, text: str | None) -> float:
    try:
        share = 0.5 if text is None else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        fix = f"Write for example {key}=run:A+0.3*run:B."
        raise UserError(key, "must give the second source a share in [0, 1]", text, fix)
    return share


def warm_start(networks: Networks, init: Mapping[str, str], find: Find) -> None:
    """Give roles the weights of roles of the same name in other runs; on the meta device only the fit is checked.

    init: role -> "run:DIR" or "stage:NAME", with "@ROLE" behind it for a role of another name, or two of them with a
    plus between. Weights are the other run's averages where it kept them. In copy mode an adapter of the source is
    merged; a lora role needs an equal adapter. Roles whose own `init` is this role follow it, and its averages begin
    again. Raises UserError if source or role do not exist or the weights do not fit.
    """
    for role, text in init.items():
        key = f"init.{role}"
        sources, share = parse(key, text)
        if role not in networks.owned:
            raise UserError(key, f"must be one of the trained roles {list(networks.owned)}", role, "Mend the name.")
        found = [(find(key, source.where), source.role or role) for source in sources]
        start(networks, [role, *_followers(networks, role, init)], found, share, key)
        networks.restart_averages(role)


def start(
    networks: Networks, roles: Sequence[str], sources: Sequence[tuple[Networks, str]], share: float, key: str
) -> None:
    """Write (1 - share) of the first source's weights and `share` of the last one's into `roles`, all of one mode.

    sources: one or two (networks, role). key: what errors name. Raises UserError if they do not fit.
    """
    mode = networks.modes[roles[0]]
    if len(sources) == 2:
        if mode == "lora":
            fix = f"Set roles.{roles[0]}=copy: into a copy adapters are merged."
            raise UserError(key, "must name one run in lora mode: the factors of two adapters do not add", "two", fix)
        _check_teachers(sources[0][0], sources[1][0], key)
    weights = [_weights(source, role, mode, key) for source, role in sources]
    for role in roles:
        for part in weights:
            _check_fit(networks.state(role), part, key)
        if not any(value.is_meta for value in networks.state(role).values()):
            networks.load(role, mix(weights[0], weights[-1], share))


def mix(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) first + share second, tensor by tensor; with share 0 or 1 that one itself. Counters are the first's.

    Both have the same names and shapes.
    """
    if share in (0, 1):
        return dict(second if share else first)
    return {
        name: torch.lerp(value.double(), second[name].double(), share).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def _weights(source: Networks, role: str, mode: str, key: str) -> dict[str, Tensor]:
    if role not in source.owned:
        fix = "Put @ROLE behind the folder for a role of another name."
        raise UserError(key, f"must name a run with the role {role}", list(source.owned), fix)
    if mode == "copy" and source.roles[role].build == "denoiser":  # heads and scalars have nothing to merge
        return dict(source.standalone(role).state_dict())
    return source.state(role)


def _followers(networks: Networks, role: str, init: Mapping[str, str]) -> list[str]:
    """The roles that would have been made from this one."""
    made = [name for name, other in networks.roles.items() if other.init == role and name not in init]
    return [name for name in made if networks.modes[name] == networks.modes[role]]


def _check_teachers(first: Networks, second: Networks, key: str) -> None:
    """Between students of two teachers lies none."""
    a, b = (dict(base_state(networks.teacher)) for networks in (first, second))
    if any(value.is_meta for value in (*a.values(), *b.values())):
        return
    if a.keys() != b.keys() or not all(a[name].shape == b[name].shape and a[name].equal(b[name]) for name in a):
        raise UserError(key, "must mix two runs of one teacher", "two teachers", "Name runs with equal networks.")


def _check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], key: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != given:
        odd = next(name for name in [*shapes, *given] if shapes.get(name) != given.get(name))
        raise UserError(
            key,
            f"must hold weights of this network: {odd} has shape {shapes.get(odd)}",
            given.get(odd, "nothing"),
            "Use the run's teacher, mode and lora rank, or start from the teacher.",
        )
