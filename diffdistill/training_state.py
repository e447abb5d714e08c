"""All that changes while a run trains, as tensors and JSON values and back: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffdistill.checkpoint import Checkpoint, joined, split
from diffdistill.distillers.base import Distiller, Loss
from diffdistill.errors import UserError
from diffdistill.networks.roles import Networks
from diffdistill.shards import part, placed

Optimizers = dict[str, torch.optim.Optimizer]


@dataclass
class TrainingState:
    """global_batch: samples of one step, of all processes.

    step: steps done.  seconds, cpu_seconds: of training alone.  dearest: CPU seconds of its dearest step.
    made_cpu_seconds: of what the teacher made before it.  peak_bytes: of live tensors in one full
    step, 0 before that.

    snapshots: name -> weights, of Transitions.  latest: losses and norms of gradients of each phase that ran since the
    last line of the log; not saved.  Data and noise need nothing: their draws are keyed by seed and step.
    """

    distiller: Distiller
    networks: Networks
    optimizers: Optimizers
    global_batch: int
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    dearest: float = 0.0
    made_cpu_seconds: float = 0.0
    peak_bytes: int = 0
    snapshots: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    latest: dict[str, tuple[list[Loss], dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def next_cpu_seconds(self) -> float:
        """What the process may have spent after one more step."""
        return self.made_cpu_seconds + self.cpu_seconds + self.dearest

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file name: weights of every role, averages, optimizer states, snapshots, the method's own."""
        networks = self.networks
        files = {role: networks.state(role) for role in networks.owned}
        for role, average in networks.averages().items():
            names = [name for name, _ in networks.named_weights(role)]
            files[f"average-{role}"] = dict(zip(names, average.average, strict=True))
        for role, optimizer in self.optimizers.items():
            files[f"optimizer-{role}"] = {
                f"{key}/{name}": value
                for name, weight in networks.named_weights(role)
                for key, value in optimizer.state[weight].items()
                if isinstance(value, Tensor)
            }
        for name, weights in self.snapshots.items():
            files[f"snapshot-{name}"] = weights
        files["method"] = split(self.distiller.state_dict())[1]
        return {name: named for name, named in files.items() if named}

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {
            "global_batch": self.global_batch,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "dearest": self.dearest,
            "peak_bytes": self.peak_bytes,
            "networks": self.networks.counters(),
            "optimizers": {role: self._settings(role) for role in self.optimizers},
            "snapshots": sorted(self.snapshots),
            "method": split(self.distiller.state_dict())[0],
            "roles": list(self.networks.owned),
            "averages": list(self.networks.averages()),
        }

    def _settings(self, role: str) -> dict[str, Any]:
        """An optimizer without its tensors: groups, and the states that are plain numbers."""
        optimizer = self.optimizers[role]
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        numbers = {
            f"{key}/{name}": value
            for name, weight in self.networks.named_weights(role)
            for key, value in optimizer.state[weight].items()
            if not isinstance(value, Tensor)
        }
        return {"groups": groups, "numbers": numbers}

    def load(self, checkpoint: Checkpoint) -> None:
        """Go back to where the checkpoint was taken. Raises UserError if it belongs to another set of networks."""
        values = checkpoint.values
        if checkpoint.schema < 2:
            raise UserError(
                "resume",
                "needs a checkpoint of schema 2 or later",
                f"{checkpoint.path}, whose schema {checkpoint.schema} holds weights alone",
                "Start a new run from its weights: init.student=run:DIR.",
            )
        networks = self.networks
        if values["roles"] != list(networks.owned) or values["averages"] != list(networks.averages()):
            fix = "Start a new run: init.student=run:DIR takes weights over."
            raise UserError("resume", f"needs the roles {values['roles']} of its checkpoint", list(networks.owned), fix)
        for role in networks.owned:
            networks.load(role, checkpoint.tensors(role))
        for role, average in networks.averages().items():
            saved = checkpoint.tensors(f"average-{role}")
            for (name, _), tensor in zip(networks.named_weights(role), average.average, strict=True):
                part(tensor).copy_(part(placed(saved[name], tensor)))
        for role in self.optimizers:
            self._load_optimizer(role, checkpoint)
        networks.load_counters(values["networks"])
        self.snapshots = {name: checkpoint.tensors(f"snapshot-{name}") for name in values["snapshots"]}
        has_tensors = (checkpoint.path / "method.safetensors").is_file()
        self.distiller.load_state_dict(joined(values["method"], checkpoint.tensors("method") if has_tensors else {}))
        self.step, self.seconds, self.peak_bytes = checkpoint.step, values["seconds"], values["peak_bytes"]
        self.dearest = values.get("dearest", 0.0)
        self.cpu_seconds = values.get("cpu_seconds", 0.0)  # older checkpoints did not count them

    def _load_optimizer(self, role: str, checkpoint: Checkpoint) -> None:
        optimizer, saved = self.optimizers[role], checkpoint.values["optimizers"][role]
        entries: Mapping[str, Any] = saved["numbers"]
        if (checkpoint.path / f"optimizer-{role}.safetensors").is_file():  # there is none before its first step
            entries = {**entries, **checkpoint.tensors(f"optimizer-{role}")}
        weights = self.networks.named_weights(role)
        index = {name: i for i, (name, _) in enumerate(weights)}
        state: dict[int, dict[str, Any]] = {}
        for entry, value in entries.items():
            key, _, name = entry.partition("/")
            of = weights[index[name]][1]
            state.setdefault(index[name], {})[key] = placed(value, of) if isinstance(value, Tensor) else value
        groups = []
        for ours, theirs in zip(optimizer.state_dict()["param_groups"], saved["groups"], strict=True):
            plain = {k: tuple(v) if isinstance(ours.get(k), tuple) else v for k, v in theirs.items()}
            groups.append({**plain, "params": ours["params"]})
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_averaged(networks: Networks, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's weights into the networks, averages in place of the weights they average.

    For sampling, evaluation, export and warm starts; reads every schema.
    """
    for role in checkpoint.values["roles"]:
        networks.load(role, checkpoint.tensors(role))
    for role in checkpoint.values["averages"]:
        networks.load(role, {**networks.state(role), **checkpoint.tensors(f"average-{role}")})
