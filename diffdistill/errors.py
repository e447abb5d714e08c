"""The exception for what a user can cause, checks that raise it, and the one for a run that was told to stop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


class UserError(ValueError):
    """A mistake in what the user asked for: ends with exit status 2 and this one message.

    key: the configuration key or command-line word at fault.  constraint: what must hold.
    value: what was given.  fix: what to do about it.
    """

    def __init__(self, key: str, constraint: str, value: object, fix: str) -> None:
        super().__init__(f"{key} {constraint}, got {value}. {fix}")
        self.key, self.constraint, self.value, self.fix = key, constraint, value, fix

    def __reduce__(self) -> tuple[Any, ...]:
        return _told, (str(self), self.key, self.constraint, str(self.value), self.fix)


def _told(message: str, *parts: str) -> UserError:
    """A UserError of another process."""
    error = UserError(*parts)
    error.args = (message,)
    return error


class Stopped(BaseException):
    """A run that ended early because it was told to, everything saved. status: what the process exits with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped, exit status {status}")
        self.status = status


def refuse_url(key: str, path: str) -> None:
    """Refuse a URL where a path of this machine is read or written: its `//` would silently name a local folder."""
    scheme, mark, rest = path.partition("://")
    if not mark or not scheme.replace("+", "").replace("-", "").isalnum():
        return
    fix = (
        f"Write {rest}." if scheme in ("file", "local") else "Mount it (rclone mount, s3fs, gcsfuse), or copy it here."
    )
    raise UserError(key, "must be a path of this machine, not a URL", path, fix)


def require_positive(**values: float) -> None:
    """Refuse the first of the named numbers that is not finite and > 0."""
    for key, value in values.items():
        if not 0 < value < float("inf"):
            raise UserError(key, "must be finite" if value > 0 else "must be > 0", value, "Give a positive number.")


def require_at_least(least: float, **values: float) -> None:
    """Refuse the first of the named numbers that is not finite and >= least."""
    for key, value in values.items():
        if not least <= value < float("inf"):
            raise UserError(key, f"must be >= {least}", value, "Raise it.")


def refusing(refuse: Callable[..., None]) -> Callable[[_Function], _Function]:
    """Decorator: `refuse` checks keyword arguments of a function at every call.

    A configuration that binds them (`_partial_: true`) calls `function.refuse` at once, before any work.
    """
    names = inspect.signature(refuse).parameters

    def decorated(function: _Function) -> _Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            bound = signature.bind(*args, **keywords).arguments
            refuse(**{name: value for name, value in bound.items() if name in names})
            return function(*args, **keywords)

        checked.refuse = refuse  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorated
