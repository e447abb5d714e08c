"""Where weights lie: folders, hub ids and the shipped assets."""

from __future__ import annotations

from pathlib import Path


def resolve(path: str) -> str | Path:
    """`asset:<name>` -> the folder inside this package; anything else stays as it is."""
    if path.startswith("asset:"):
        return Path(__file__).parents[1] / "assets" / path.removeprefix("asset:")
    return path
