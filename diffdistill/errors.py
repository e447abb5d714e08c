"""The one exception for what a user can cause, and the one for a run that was told to stop."""


class UserError(ValueError):
    """A mistake in what the user asked for: ends with exit status 2 and this one message.

    key: the configuration key or command-line word at fault.  constraint: what must hold.
    value: what was given.  fix: what to do about it.
    """

    def __init__(self, key: str, constraint: str, value: object, fix: str) -> None:
        super().__init__(f"{key} {constraint}, got {value}. {fix}")
        self.key, self.constraint, self.value, self.fix = key, constraint, value, fix


class Stopped(BaseException):
    """A run that ended early because it was told to, everything saved. status: what the process exits with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped, exit status {status}")
        self.status = status
