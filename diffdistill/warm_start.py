"""`init.<role>=run:DIR`: a role starts from the weights of another run instead of the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.networks.roles import Networks

Find = Callable[[str, str], Networks]  # (key, run:DIR or stage:NAME) -> networks with averaged weights


def warm_start(networks: Networks, init: Mapping[str, str], find: Find) -> None:
    """Give roles the weights of roles of the same name in other runs; on the meta device only the fit is checked.

    init: role -> "run:DIR" or "stage:NAME", with "@ROLE" behind it for a role of another name. Weights are the other
    run's averages where it kept them. In copy mode an adapter of the source is merged; a lora role needs an equal
    adapter. Roles whose own `init` is this role follow it, and its averages begin again.
    Raises UserError if source or role do not exist or the weights do not fit.
    """
    for role, text in init.items():
        key = f"init.{role}"
        where, _, other = text.partition("@")
        if where.partition(":")[0] not in ("run", "stage") or not where.partition(":")[2]:
            raise UserError(key, "must be run:DIR or stage:NAME", text, f"Write for example {key}=run:runs/x.")
        if role not in networks.owned:
            raise UserError(key, f"must be one of the trained roles {list(networks.owned)}", role, "Mend the name.")
        weights = _weights(key, find(key, where), other or role, networks.modes.get(role))
        for follower in _followers(networks, role, init):
            _load(key, networks, follower, weights)
        networks.restart_averages(role)


def _weights(key: str, source: Networks, role: str, mode: str | None) -> dict[str, Tensor]:
    if role not in source.owned:
        fix = "Put @ROLE behind the folder for a role of another name."
        raise UserError(key, f"must name a run with the role {role}", list(source.owned), fix)
    if mode == "copy":
        return dict(source.standalone(role).state_dict())
    return source.state(role)


def _followers(networks: Networks, role: str, init: Mapping[str, str]) -> list[str]:
    """The role, and those that would have been made from it."""
    made = [name for name, other in networks.roles.items() if other.init == role and name not in init]
    return [role, *(name for name in made if networks.modes[name] == networks.modes[role])]


def _load(key: str, networks: Networks, role: str, weights: Mapping[str, Tensor]) -> None:
    own = networks.state(role)
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
    if not any(value.is_meta for value in own.values()):
        networks.load(role, weights)
