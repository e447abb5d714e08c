"""Command lines run by several processes that meet over gloo, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Patch = pytest.MonkeyPatch
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """A process that ended. statuses: of each command line it ran."""

    status: int
    statuses: list[int | None]
    out: str
    err: str


def start(size: int, words: Sequence[str], extra: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """`python WORDS` on `size` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    common = {
        **os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(paths), **(extra or {}),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for them; one that hangs is made to show where, and ends with -6."""
    found, until = [], time.monotonic() + float(os.environ.get("LIMIT", "240"))
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            out, err = process.communicate()
        told = [line for line in out.splitlines() if line.startswith("STATUSES ")]
        found.append(Ended(process.returncode, json.loads(told[-1][9:]) if told else [], out, err))
    return found


def run(size: int, lines: Sequence[Sequence[str]]) -> list[Ended]:
    """Command lines of diffdistill, one after the other in the same processes, which start slowly.

    A word patch=NAME has a function of this file called before the line, its changes undone after it. A word kill=N
    ends a line in the middle of a step, after N updates: its status is then None.
    """
    return ended(start(size, ["-m", "processes", json.dumps([list(line) for line in lines])]))


def rank() -> int:
    return int(os.environ["RANK"])


def in_small_messages(patch: Patch) -> None:
    """Gradients of replicas are averaged a few weights at a time."""
    patch.setattr("diffdistill.parallel._BUCKET", 3000)


def in_float64(patch: Patch) -> None:
    """Networks, data and optimizers in float64: what is left of a difference is no rounding."""
    from diffdistill import recipe

    original = recipe.assemble_parts

    def assemble_parts(settings: Any, data: Any, teacher: Any, *rest: Any) -> Any:
        return original(settings, data, teacher.double(), *rest)

    patch.setattr(recipe, "assemble_parts", assemble_parts)


def nan_on_rank_1(patch: Patch) -> None:
    """The loss of the second process is nan at its fourth update."""
    from diffdistill.distillers.base import Loss
    from diffdistill.distillers.distribution_matching.dmd2 import DMD2

    original, calls = DMD2.critic_loss, [0]

    def critic_loss(self: Any, batch: Any, rng: Any) -> Loss:
        loss = original(self, batch, rng)
        calls[0] += 1
        bad = rank() == 1 and calls[0] == 4
        return Loss({k: v * float("nan") if bad else v for k, v in loss.terms.items()}, loss.stats)

    patch.setattr(DMD2, "critic_loss", critic_loss)


def bad_file_on_rank_1(patch: Patch) -> None:
    """The second process finds a damaged file at step 3."""
    from diffdistill.data import Mixture2D
    from diffdistill.errors import UserError

    original = Mixture2D.batch

    def batch(self: Any, rng: Any, *rest: Any) -> Any:
        if rank() == 1 and rng.step == 3 and rng.phase == "data":
            raise UserError("data.path", "must hold images that can be read", "b.png", "Remove it.")
        return original(self, rng, *rest)

    patch.setattr(Mixture2D, "batch", batch)


def full_disk(patch: Patch) -> None:
    """The main process finds no room for the second file of a checkpoint; the others know nothing of it."""
    import errno

    from diffdistill import checkpoint

    original, calls = checkpoint.save_file, [0]

    def save_file(*given: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(given[1]))
        original(*given)

    patch.setattr(checkpoint, "save_file", save_file)


def counted_reductions(patch: Patch) -> None:
    """Tells after the line how often gradients were reduced over the processes."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    original, calls = group.foreach_reduce, [0]

    def foreach_reduce(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        return original(*given, **named)

    patch.setattr(group, "foreach_reduce", foreach_reduce)
    patch.after = lambda: print(f"REDUCTIONS {calls[0]}")  # type: ignore[attr-defined]


def counted_bytes(patch: Patch) -> None:
    """Tells what this process holds of roles, averages and optimizers after a run."""
    from diffdistill.memory import optimizer_tensors
    from diffdistill.shards import parts
    from diffdistill.trainer import Trainer

    original = Trainer.fit

    def fit(self: Any, state: Any, *rest: Any) -> None:
        original(self, state, *rest)
        networks = state.networks
        modules = [networks.teacher, *(networks.module(role) for role in networks.owned)]
        weights = {id(weight): weight for module in modules for weight in module.parameters()}
        averages = [tensor for average in networks.averages().values() for tensor in average.average]
        held = parts([*weights.values(), *averages, *optimizer_tensors(state.optimizers.values())])
        print(f"BYTES {sum(tensor.numel() * tensor.element_size() for tensor in held)}", file=sys.__stdout__)

    patch.setattr(Trainer, "fit", fit)


def training_alone(patch: Patch) -> None:
    """No pictures, figures, export and report; tells the seconds of training."""
    from diffdistill.run import Run
    from diffdistill.run_pictures import RunPictures

    def conclude(self: Any, state: Any, stop: Any) -> dict[str, Any]:
        print(f"WALL {state.seconds}", file=sys.__stdout__)
        return {}

    patch.setattr(Run, "_conclude", conclude)
    patch.setattr(Run, "_print", lambda self, summary: None)
    for name in ("keep", "report"):
        patch.setattr(RunPictures, name, lambda self, *given: None)


def timed_saves(patch: Patch) -> None:
    """Tells the seconds of each checkpoint."""
    from diffdistill.run import Run

    original, seconds = Run._save, list[float]()

    def save(self: Any, state: Any) -> None:
        started = time.perf_counter()
        original(self, state)
        seconds.append(round(time.perf_counter() - started, 3))

    patch.setattr(Run, "_save", save)
    patch.after = lambda: print(f"SAVES {seconds}")  # type: ignore[attr-defined]


def killed(patch: Patch, updates: int) -> None:
    from interruption import KilledError

    from diffdistill.trainer import Trainer

    original, left = Trainer.update, [updates]

    def update(self: Any, *given: Any) -> Any:
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        return original(self, *given)

    patch.setattr(Trainer, "update", update)


def _run(line: list[str]) -> int | None:
    from interruption import KilledError

    from diffdistill.cli import main as diffdistill

    with Patch.context() as patch:
        for word in line:
            kind, _, name = word.partition("=")
            if kind == "patch":
                globals()[name](patch)
            elif kind == "kill":
                killed(patch, int(name))
        try:
            return diffdistill([word for word in line if not word.startswith(("patch=", "kill="))])
        except KilledError:
            return None
        finally:
            getattr(patch, "after", lambda: None)()


def main() -> None:
    from diffdistill.parallel import Parallel

    with Parallel().running():  # one meeting for all
        statuses = [_run(line) for line in json.loads(sys.argv[1])]
    print(f"STATUSES {json.dumps(statuses)}")


if __name__ == "__main__":
    main()
