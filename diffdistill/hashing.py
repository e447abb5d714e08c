"""SHA-256 of files: of checkpoints, exported folders and the weights that a card belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 2**20


def file_sha256(path: Path) -> str:
    """Hexadecimal digest, read block by block: weights may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
