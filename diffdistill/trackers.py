"""Trackers: what a run writes into its folder is sent to a service too, through accelerate's trackers.

The folder stays the record. A service that is away, refuses or breaks is told once and left alone; the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

from diffdistill.errors import UserError

IDS = "tracker.json"  # in the run's folder: the service's id of this run, so that a resumed run stays one there
SECONDS = 30  # to reach a service, at the beginning and at the end


class Tracker(Protocol):
    """Where a run is tracked, chosen by the key `tracker`."""

    def check(self) -> None:
        """Raise UserError where it could never work here, before any work."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any], step: int, tell: Callable[[str], None]) -> Log:
        """Begin, or go on after `step`. folder: the run's.  name: for people.  config: plain values.  tell: prints."""


class Log(Protocol):
    """What a run sends."""

    def figures(self, step: int, values: Mapping[str, Any]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Nowhere:
    """No service: the folder is the only record."""

    def check(self) -> None:
        pass

    def open(self, folder: Path, name: str, config: Mapping[str, Any], step: int, tell: Callable[[str], None]) -> Log:
        return Silent()


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases. mode: auto is online where a key is known (WANDB_API_KEY, or after `wandb login`) and offline
    otherwise, unless WANDB_MODE says; it never asks. Offline runs lie in run_dir/wandb, `wandb sync` sends them.

    project, entity, group, tags: as W&B knows them; name: null is the run folder's.
    """

    project: str = "diffdistill"
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline"] = "auto"

    def check(self) -> None:
        if bad := sorted(set(self.project) & set("/\\#?%:")):
            raise UserError(
                "tracker.project", "must not hold any of / \\ # ? % :", repr(self.project), f"Leave out {bad[0]}"
            )
        _named(self.project)
        _needs("wandb", "wandb")
        if self.mode == "online" and not _wandb_key():
            fix = "Set WANDB_API_KEY or run wandb login; mode=auto keeps the run on disk without one."
            raise UserError("tracker.mode", "online needs a key of Weights & Biases", "none", fix)

    def open(self, folder: Path, name: str, config: Mapping[str, Any], step: int, tell: Callable[[str], None]) -> Log:
        from accelerate.tracking import WandBTracker

        mode = self._mode()

        def begin(mode: str) -> Any:
            keywords = {
                "id": _known(folder, "wandb"),
                "resume": "allow",
                "mode": mode,
                "dir": str(folder),
                "settings": _wandb_settings(),
            }
            told = {"name": self.name or name, "entity": self.entity, "group": self.group, "tags": list(self.tags)}
            return _started(lambda: WandBTracker(self.project, **keywords, **told))

        def connect() -> Any:
            if mode != "online":
                return begin(mode)
            try:
                return begin("online")
            except Exception as error:
                tell(f"W&B cannot be reached ({_first_line(error)}): this run is kept offline in {folder / 'wandb'}")
                return begin("offline")

        return _Guarded("wandb", connect, _plain(config), _wandb_picture, tell)

    def _mode(self) -> str:
        if self.mode != "auto":
            return self.mode
        return os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")


@dataclass(frozen=True)
class TensorBoard:
    """Event files in run_dir/tensorboard: `tensorboard --logdir runs` shows every run. Values of steps that a resumed
    run does again are dropped there."""

    def check(self) -> None:
        _needs("tensorboard", "tensorboard")

    def open(self, folder: Path, name: str, config: Mapping[str, Any], step: int, tell: Callable[[str], None]) -> Log:
        from accelerate.tracking import TensorBoardTracker

        def connect() -> Any:
            return _started(lambda: TensorBoardTracker("tensorboard", str(folder), purge_step=step + 1))

        return _Guarded("tensorboard", connect, _plain(config), _tensorboard_picture, tell)


@dataclass(frozen=True)
class Trackio:
    """trackio: a local data base (TRACKIO_DIR), or the Space or server that TRACKIO_SPACE_ID or TRACKIO_SERVER_URL
    names. project: as trackio knows it; name: null is the run folder's, made unique."""

    project: str = "diffdistill"
    name: str | None = None

    def check(self) -> None:
        _named(self.project)
        _needs("trackio", "trackio")

    def open(self, folder: Path, name: str, config: Mapping[str, Any], step: int, tell: Callable[[str], None]) -> Log:
        from accelerate.tracking import TrackioTracker

        def connect() -> Any:
            unique = f"{self.name or name}-{_known(folder, 'trackio')}"  # it knows runs by their names
            return _started(lambda: TrackioTracker(self.project, name=unique, resume="allow", embed=False))

        return _Guarded("trackio", connect, _plain(config), _trackio_picture, tell)


class Silent:
    """Sends nothing."""

    def figures(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def picture(self, step: int, name: str, path: Path) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class _Guarded:
    """One of accelerate's trackers; its first error is told and ends it."""

    name: str
    connect: Callable[[], Any]
    config: Mapping[str, Any]
    send_picture: Callable[[Any, int, str, Path], None]
    tell: Callable[[str], None]
    tracker: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        logging.getLogger(self.name).setLevel(logging.ERROR)  # their notices are not this program's
        try:
            self.tracker = self.connect()
            if self.name == "tensorboard":  # its table of settings takes numbers alone and begins a run of its own
                self.tracker.log({"config": json.dumps(self.config, indent=2)}, step=0)
            else:
                self.tracker.store_init_configuration(self.config)
        except Exception as error:
            self._give_up(error)

    def figures(self, step: int, values: Mapping[str, Any]) -> None:
        self._send(lambda: self.tracker.log(dict(_flat(values)), step=step))

    def picture(self, step: int, name: str, path: Path) -> None:
        self._send(lambda: self.send_picture(self.tracker, step, name, path))

    def close(self) -> None:
        self._send(lambda: self.tracker.finish())
        self.tracker = None

    def _send(self, action: Callable[[], None]) -> None:
        if self.tracker is None:
            return
        try:
            action()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.tracker = None
        self.tell(
            f"tracker {self.name} is off from here on ({_first_line(error)}); the run goes on and its folder has all"
        )


def _wandb_settings() -> Any:
    """Nothing asked, nothing captured, no waiting without end."""
    import wandb

    wished = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "init_timeout": SECONDS,
              "login_timeout": SECONDS, "finish_timeout": SECONDS}  # fmt: skip
    known = getattr(wandb.Settings, "model_fields", wished)  # older versions lack some
    return wandb.Settings(**{key: value for key, value in wished.items() if key in known})


def _wandb_key() -> bool:
    """Whether a key is known: from the environment, or where `wandb login` keeps it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_picture(tracker: Any, step: int, name: str, path: Path) -> None:
    import wandb

    tracker.log({name: wandb.Image(str(path))}, step=step)


def _tensorboard_picture(tracker: Any, step: int, name: str, path: Path) -> None:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")


def _trackio_picture(tracker: Any, step: int, name: str, path: Path) -> None:
    import trackio

    tracker.log({name: trackio.Image(str(path))}, step=step)


def _needs(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError("tracker", f"needs the package {package}", "not installed", f"pip install {extra}")


def _named(project: str) -> None:
    if not project.strip():
        raise UserError("tracker.project", "must be a name", repr(project), "diffdistill is the default.")


def _started(make: Callable[[], Any]) -> Any:
    """A tracker of accelerate that runs; older versions start when they are made."""
    tracker = make()
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def _known(folder: Path, service: str) -> str:
    """The service's id of this run, made up the first time."""
    file = folder / IDS
    ids: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    if service not in ids:
        ids[service] = uuid.uuid4().hex[:8]
        file.write_text(json.dumps(ids) + "\n")
    return ids[service]


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Figures as services take them: an interval `NAME` is `NAME/low` and `NAME/high`; None was not measured."""
    for key, value in values.items():
        if isinstance(value, list | tuple):
            low, high = value
            yield from ((f"{key}/low", low), (f"{key}/high", high))
        elif value is not None:
            yield key, value


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would keep it."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
