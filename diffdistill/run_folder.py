"""The folder of a run: its lock, its configuration with a schema version, its metrics."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diffdistill import checkpoint
from diffdistill.checkpoint import Checkpoint
from diffdistill.errors import UserError
from diffdistill.evaluation.early_stop import loss_of

STARTS_SCHEMA = 1  # of starts.json
SCHEMA = 2  # of config.yaml; 1 had no key `schema`, no warm start, no stages
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EROFS: "it is read-only"}
_FULL |= {errno.EACCES: "permission denied", errno.EPERM: "permission denied"}
_FULL |= {errno.EFBIG: "a file would be larger than is allowed here"}


def say(text: str) -> None:
    """Tell on stderr what the user must not miss."""
    logging.getLogger(__name__).warning(text)


GO_ON = "What was committed before stands: make room, then go on with resume=true."


@contextmanager
def writing(path: Path | str, key: str = "run_dir", fix: str = GO_ON) -> Iterator[None]:
    """Within, a full disk or a folder without permission is the user's one message, naming `key`."""
    try:
        yield
    except OSError as error:
        reason = _FULL.get(error.errno or 0)
        if reason is None:  # safetensors has the number in its text alone
            reason = next((text for number, text in _FULL.items() if f"os error {number})" in str(error)), None)
        if reason is None:
            raise
        raise UserError(key, f"must be writable: {reason}", str(path), fix) from error


@dataclass(frozen=True)
class RunFolder:
    """path: the run's directory, which need not exist yet."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def is_finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process alone; it is free again when the process ends, however it ends.

        Raises UserError if another process holds it.
        """
        with writing(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                fix = "Name a new or empty folder."
                raise UserError("run_dir", "must be a folder", str(self.path), fix) from error
            lock = FileLock(self.path / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                fix = "Wait for it, or name another folder."
                raise UserError("run_dir", "must not be in use by another run", str(self.path), fix) from error
        try:
            yield
        finally:
            lock.release()

    def occupied(self) -> bool:
        """Whether something other than a lock lies there."""
        return self.path.exists() and (not self.path.is_dir() or any(p.name != ".lock" for p in self.path.iterdir()))

    def refuse_occupied(self, key: str = "run_dir") -> None:
        """A new run never writes over another, nor below a file. key: what the message names."""
        above = next((p for p in self.path.absolute().parents if p.exists()), None)
        if above is not None and not above.is_dir():
            fix = f"{above} is a file."
            raise UserError(key, "must lie in a folder", str(self.path), fix)
        if not self.occupied():
            return
        fix = "Name another folder, or move this one away."
        if self.config_file.is_file():
            fix = "Go on with it by resume=true, name another folder, or move this one away."
        raise UserError(key, "must be new or empty", str(self.path), fix)

    def write_config(self, settings: Mapping[str, Any]) -> None:
        plain = {"schema": SCHEMA, **{k: v for k, v in settings.items() if k not in ("dry_run", "resume")}}
        aside = self.config_file.with_name(".config.yaml")
        aside.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
        aside.replace(self.config_file)  # whole or not at all

    def read_config(self, key: str = "run") -> DictConfig:
        """The run's settings as this version reads them, resolved.

        Raises UserError, naming `key`, if there are none, if they cannot be read or come from a newer version.
        """
        if not self.config_file.is_file():
            fix = "Look for its config.yaml."
            raise UserError(key, "must be a folder that `diffdistill train` wrote", str(self.path), fix)
        try:
            settings = OmegaConf.load(self.config_file)
            if not isinstance(settings, DictConfig):
                raise ValueError("it holds no mapping")
            if "${" in self.config_file.read_text():  # a run writes none; one could fetch what is in the environment
                raise ValueError("It holds an interpolation ${...}, which no run writes.")
            schema = settings.pop("schema", 1)
        except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(key, "must hold a readable config.yaml", str(self.config_file), first) from error
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            fix = "Upgrade diffdistill." if isinstance(schema, int) else "Restore the file."
            raise UserError(key, f"must be of a schema up to {SCHEMA}, this version's", f"schema {schema}", fix)
        return _migrated(settings, schema)

    def newest(self, skip: tuple[str, ...] = ()) -> Checkpoint | None:
        """The newest whole checkpoint, None if there is none; damaged ones are told on stderr. skip: files not read."""
        return checkpoint.newest(self.checkpoints, say, skip)

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after `step`: they will be written again, equal."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        torn = [number for number, line in self._numbered() if line is None]
        if torn and torn[-1] == len(path.read_text().splitlines()):
            torn.pop()  # a kill may leave the last one unfinished, and no other
        if torn:
            say(f"{path}: line {', '.join(map(str, torn))} cannot be read and is left out")
        aside = path.with_name(".metrics.jsonl")
        with aside.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def best_step(self, metric: str | None = None) -> int | None:
        """The evaluated step with the best figure whose checkpoint stands; None if nothing was evaluated.

        metric: of the evaluations; None is the first distance that they have.
        """
        standing = {int(path.name.removeprefix("step-")) for path in checkpoint.steps(self.checkpoints)}
        found = [(loss, line["step"]) for line in self.metrics() if (loss := loss_of(line, metric)) is not None]
        return min(((f, s) for f, s in found if s in standing), default=(None, None))[1]

    def was_evaluated(self, step: int) -> bool:
        return any(line["step"] == step and any(k.startswith("evaluation/") for k in line) for line in self.metrics())

    @property
    def in_use(self) -> bool:
        """Whether a process holds the folder."""
        if not (self.path / ".lock").is_file():
            return False
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; the one that a kill left unfinished is passed over."""
        yield from (line for _, line in self._numbered() if line is not None)

    def _numbered(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Numbers and lines of metrics.jsonl, None for one that cannot be read."""
        path = self.path / "metrics.jsonl"
        text = path.read_text(errors="replace") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            yield number, found if isinstance(found, dict) and isinstance(found.get("step"), int) else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        aside = self.path / ".summary.json"
        aside.write_text(json.dumps(summary, indent=1) + "\n")
        aside.replace(self.path / "summary.json")

    def add_start(self, step: int, told: Mapping[str, Any]) -> None:
        """Note in starts.json where a process begins, or goes on, and what is told of it."""
        starts = [*self.starts(), {"step": step, **told}]
        aside = self.path / ".starts.json"
        aside.write_text(json.dumps({"schema": STARTS_SCHEMA, "starts": starts}, indent=1) + "\n")
        aside.replace(self.path / "starts.json")

    def starts(self) -> list[dict[str, Any]]:
        """What `add_start` noted, in order; none where there is no such file, or one of another schema."""
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((self.path / "starts.json").read_text())
            return list(found["starts"]) if found.get("schema") == STARTS_SCHEMA else []
        return []

    def add_metrics(self, step: int, figures: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


def _migrated(settings: DictConfig, schema: int) -> DictConfig:
    """Settings of an older schema as the current one has them."""
    if schema == 1:  # the keys that came with schema 2, at the values that mean what schema 1 did
        new = {"init": {}, "stages": {}, "trainer": {"keep": 2}}
        settings = OmegaConf.merge(new, settings)  # type: ignore[assignment]
    return settings


def read_json(path: Path, key: str) -> dict[str, Any]:
    """A JSON object; UserError, naming `key` and the file, if it cannot be read."""
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(key, "must hold readable JSON", str(path), f"{type(error).__name__}: {error}"[:200]) from error
    return values


def new_file(key: str, path: str) -> Path:
    """A path whose folder exists and that is no folder itself, nor a file that a run wrote."""
    file = Path(path)
    for folder in file.absolute().parents:
        if file.exists() and RunFolder(folder).config_file.is_file() and RunFolder(folder).checkpoints.is_dir():
            raise UserError(key, "must not replace a file of a run", path, "Name another file.")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UserError(key, "must name a file in an existing folder", path, "Make the folder, or name a file.")
    return file
