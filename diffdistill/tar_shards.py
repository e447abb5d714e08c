"""Tar shards read strictly: tarfile takes a damaged header for the end, and what follows would be lost unseen."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from diffdistill.errors import UserError

_BLOCK = 512
_MARK = 2 * _BLOCK  # of zeros, at the end of every tar
_AT_ONCE = 2**20


def entries(file: Path, key: str) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar, in order. key: what errors name.

    Raises UserError, naming the file and the place, where it is no tar, is cut, or has a damaged header.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member
            end = archive.offset
        fault = _after(file, end)
    except (OSError, tarfile.TarError) as error:
        raise _damaged(file, key, str(error)) from error
    if fault:
        raise _damaged(file, key, fault)


def _after(file: Path, end: int) -> str:
    """What is wrong behind the last member that was read, which ends at byte `end`; empty if nothing is."""
    zeros = 0
    with file.open("rb") as opened:
        opened.seek(end)
        while block := opened.read(_AT_ONCE):
            if block.count(0) != len(block):
                return f"damaged at byte {end}: what stands there is no member"
            zeros += len(block)
    return "" if zeros >= _MARK else f"cut at byte {end + zeros}: the mark of its end is missing"


def _damaged(file: Path, key: str, reason: str) -> UserError:
    fix = f"It is {reason}." if reason.startswith(("cut", "damaged")) else f"{reason[:1].upper()}{reason[1:]}."
    return UserError(key, "must hold tar shards that can be read", str(file), f"{fix} Restore or remove it.")
