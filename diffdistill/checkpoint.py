"""Checkpoint folders that a kill at any moment cannot spoil: safetensors and JSON, nothing is ever unpickled.

A checkpoint is written aside, every file fsynced and hashed in a manifest, and renamed; the rename is the commit. Older
ones are pruned after that. What is incomplete or damaged is never picked: it is named, and the one before it is used.

    checkpoints/step-00000100/<role>.safetensors, average-<role>.safetensors, optimizer-<role>.safetensors, ...
                              state.json      what is not a tensor
                              manifest.json   size and sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.hashing import file_sha256

SCHEMA = 2  # 1: weights and averages alone, no manifest; good for sampling, not for going on
MANIFEST, STATE = "manifest.json", "state.json"
_ASIDE = ".writing-"  # being written, or left behind by a kill
_DOOMED = ".removing-"  # being removed


class Tensors(Protocol):
    """File name without its ending -> tensors by name; gone through once."""

    def items(self) -> Iterable[tuple[str, Mapping[str, Tensor]]]: ...


class DamagedError(Exception):
    """A checkpoint that must not be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder. values: its state.json."""

    path: Path
    values: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.values["step"])

    @property
    def schema(self) -> int:
        return int(self.values["schema"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU, independent of the file."""
        return {key: value.clone() for key, value in load_file(self.path / f"{name}.safetensors").items()}


def commit(folder: Path, step: int, tensors: Tensors, values: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` into `folder`; when this returns it survives a kill and a power cut.

    An older one of the same step is replaced. Raises OSError where it cannot be written; then nothing is left behind
    and the older ones stand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _name(step)
    aside = folder / f"{_ASIDE}{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(aside, tensors, {"schema": SCHEMA, "step": step, **values})
        if target.exists():
            _remove(target)
        aside.rename(target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _write(aside: Path, tensors: Tensors, values: Mapping[str, Any]) -> None:
    aside.mkdir()
    for name, named in tensors.items():
        try:
            save_file(_separate(named), aside / f"{name}.safetensors")
        except SafetensorError as error:  # its message holds what an OSError would
            raise OSError(None, str(error), str(aside / name)) from error
    (aside / STATE).write_text(json.dumps(values, indent=1))
    files = {path.name: _fingerprint(path) for path in sorted(aside.iterdir())}
    for name in files:
        _sync(aside / name)
    (aside / MANIFEST).write_text(_manifest(SCHEMA, files))
    _sync(aside / MANIFEST)
    _sync(aside)


def prune(folder: Path, last: int, best: int | None) -> None:
    """Remove all but the `last` newest checkpoints and the one of step `best`."""
    for path in steps(folder)[:-last]:
        if best is None or path.name != _name(best):
            _remove(path)


def set_aside(folder: Path, after: int) -> None:
    """Rename the checkpoints behind step `after`, which a run that goes on from there had to pass over as damaged.

    Left in place they would count among the newest, and pruning would take good ones for them.
    """
    for path in steps(folder):
        if int(path.name.removeprefix("step-")) > after:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def clean(folder: Path) -> None:
    """Remove what a killed process left half written or half removed. Only for the process that holds the run."""
    for path in [*folder.glob(f"{_ASIDE}*"), *folder.glob(f"{_DOOMED}*")]:
        shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest(folder: Path, say: Callable[[str], None], skip: tuple[str, ...] = ()) -> Checkpoint | None:
    """The newest whole checkpoint; None if there is none at all. Each damaged one is told through `say`.

    skip: beginnings of the names of files that a reader does not need, and that are not hashed.
    Raises UserError if there are some and none is whole.
    """
    found = steps(folder)
    for path in reversed(found):
        try:
            return verified(path, skip)
        except DamagedError as error:
            say(f"damaged checkpoint {path}: {error}; it is not used")
    if found:
        fix = "Restore it from a copy, or train again."
        raise UserError("checkpoints", "must hold one whole checkpoint", str(folder), fix)
    return None


def verified(path: Path, skip: tuple[str, ...] = ()) -> Checkpoint:
    """Read a checkpoint after comparing its files with its manifest.

    Raises DamagedError naming the file, UserError for one of a newer schema.
    """
    values = _json(path / STATE)
    schema = values.get("schema")
    if not isinstance(schema, int) or not isinstance(values.get("step"), int):
        raise DamagedError(f"{STATE} has no schema and step")
    if schema > SCHEMA:
        fix = "Upgrade diffdistill."
        raise UserError("checkpoint", f"must be of a schema up to {SCHEMA}, this version's", f"{schema} in {path}", fix)
    if schema == 1:  # no manifest; safetensors checks its own header
        return Checkpoint(path, values)
    manifest = _json(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or (path / MANIFEST).read_text() != _manifest(schema, files):
        raise DamagedError(f"{MANIFEST} was changed")
    if path.name.startswith("step-") and path.name != _name(values["step"]):
        raise DamagedError(f"it is of step {values['step']}")
    for name, expected in files.items():
        if not name.startswith(skip):
            if not (path / name).is_file():
                raise DamagedError(f"{name} is missing")
            if _fingerprint(path / name) != expected:
                raise DamagedError(f"{name} was changed")
    return Checkpoint(path, values)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except ValueError:
        raise DamagedError(f"{path.name} is not JSON") from None
    if not isinstance(values, dict):
        raise DamagedError(f"{path.name} is not a JSON object")
    return values


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _manifest(schema: int, files: Mapping[str, Any]) -> str:
    return json.dumps({"schema": schema, "files": files, "sha256": _digest(files)}, indent=1)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Out of sight at once, then gone: a kill in between leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f"{_DOOMED}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with a storage each, as the format asks: tied weights are written twice."""
    seen: set[int] = set()
    out = {}
    for name, tensor in named.items():
        plain = tensor.detach().contiguous()
        place = plain.untyped_storage().data_ptr()
        out[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return out


def split(state: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nested state as JSON values, each tensor replaced by {"tensor": name}, and the tensors by that name."""
    if isinstance(state, Tensor):
        return {"tensor": prefix}, {prefix: state}
    if isinstance(state, Mapping):
        if "tensor" in state or not all(isinstance(key, str) for key in state):
            raise TypeError(f"keys of a method's state must be text other than 'tensor', got {list(state)}")
        parts = {key: split(value, f"{prefix}.{key}".strip(".")) for key, value in state.items()}
    elif isinstance(state, list | tuple):
        listed = [split(value, f"{prefix}.{index}".strip(".")) for index, value in enumerate(state)]
        return [plain for plain, _ in listed], {k: v for _, tensors in listed for k, v in tensors.items()}
    else:
        return state, {}
    return {key: plain for key, (plain, _) in parts.items()}, {k: v for _, t in parts.values() for k, v in t.items()}


def joined(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `split`; tuples come back as lists."""
    if isinstance(plain, dict):
        if plain.keys() == {"tensor"}:
            return tensors[plain["tensor"]]
        return {key: joined(value, tensors) for key, value in plain.items()}
    return [joined(value, tensors) for value in plain] if isinstance(plain, list) else plain
