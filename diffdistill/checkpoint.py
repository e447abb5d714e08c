"""Weights of a run on disk: one safetensors file per role and average, one JSON for the rest."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from diffdistill.errors import UserError
from diffdistill.networks.roles import Networks

SCHEMA = 1


def save(networks: Networks, folder: Path, step: int) -> None:
    """Write every role's own weights and every evaluation average into `folder`/step-<step>."""
    target = folder / f"step-{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    for role in networks.owned:
        save_file(
            {key: value.contiguous() for key, value in networks.state(role).items()}, target / f"{role}.safetensors"
        )
    for role, average in networks.averages().items():
        named = dict(zip((name for name, _ in networks.named_weights(role)), average.average, strict=True))
        save_file(named, target / f"average-{role}.safetensors")
    # written last: a folder without it is incomplete
    state = {"schema": SCHEMA, "step": step, "roles": list(networks.owned), "averages": list(networks.averages())}
    (target / "state.json").write_text(json.dumps(state, indent=1))


def latest(folder: Path) -> Path:
    """The complete checkpoint with the highest step."""
    found = sorted(path.parent for path in folder.glob("step-*/state.json"))
    if not found:
        raise UserError("run", "must hold a checkpoint", folder, "Train it to the end, or name another run.")
    return found[-1]


def load_averaged(networks: Networks, path: Path) -> int:
    """Write a checkpoint's weights into the networks, averages in place of the weights they average.

    Returns its step. For sampling, evaluation and export.
    """
    state = json.loads((path / "state.json").read_text())
    if state.get("schema") != SCHEMA:
        raise UserError("run", f"must hold a checkpoint of schema {SCHEMA}", state.get("schema"), "Train it again.")
    for role in state["roles"]:
        networks.load(role, {**load_file(path / f"{role}.safetensors")})
    for role in state["averages"]:
        networks.load(role, {**networks.state(role), **load_file(path / f"average-{role}.safetensors")})
    return int(state["step"])
