"""Tile sizes, warps and stages of every kernel, per architecture, way of loading, element size and width.

sm_90's `tma` tiles of widths 64 and 128 were picked by timing on an H200, but for float32's dkv and tangent at 64; all
others by what the compiled code shows (evidence.py), see kernels/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["forward", "dq", "dkv", "tangent"]
Loads = Literal["tma", "pointers"]
KERNELS: tuple[Kernel, ...] = ("forward", "dq", "dkv", "tangent")
ARCHITECTURES = (80, 86, 90, 100)
WITH_TMA = (90, 100)


@dataclass(frozen=True)
class Tile:
    """m: queries, n: keys of a tile.  warps: of 32 threads, per program.  stages: of the load pipeline."""

    m: int
    n: int
    warps: int
    stages: int


# (loads, bytes per element, padded width) -> per kernel the tiles in order of speed; the first that fits is taken
_TABLE = dict[tuple[Loads, int, int], dict[Kernel, tuple[Tile, ...]]]

_SM80: _TABLE = {
    ("pointers", 2, 64): {
        "forward": (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
        "dq": (Tile(64, 64, 4, 2),),
        "dkv": (Tile(64, 64, 8, 2),),
        "tangent": (Tile(64, 64, 4, 2),),
    },
    ("pointers", 2, 128): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dq": (Tile(64, 64, 8, 2),),
        "dkv": (Tile(64, 64, 8, 2),),
        "tangent": (Tile(64, 64, 8, 2),),
    },
    ("pointers", 2, 256): {
        "forward": (Tile(64, 32, 8, 2),),
        "dq": (Tile(64, 32, 8, 1),),
        "dkv": (Tile(32, 32, 8, 1),),
        "tangent": (Tile(16, 32, 4, 1),),
    },
    ("pointers", 4, 64): {
        "forward": (Tile(64, 32, 8, 1),),
        "dq": (Tile(64, 16, 8, 1),),
        "dkv": (Tile(16, 64, 8, 1),),
        "tangent": (Tile(16, 32, 4, 1),),
    },
    ("pointers", 4, 128): {
        "forward": (Tile(16, 32, 4, 1),),
        "dq": (Tile(16, 32, 4, 1),),
        "dkv": (Tile(32, 16, 4, 1),),
        "tangent": (Tile(16, 16, 4, 1),),
    },
}
_SM86: _TABLE = {
    **_SM80,
    ("pointers", 2, 128): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dq": (Tile(64, 64, 8, 2),),
        "dkv": (Tile(64, 64, 8, 2),),
        "tangent": (Tile(64, 32, 8, 1),),
    },
}
_SM90: _TABLE = {
    ("tma", 2, 64): {
        "forward": (Tile(64, 128, 4, 2), Tile(64, 64, 4, 2)),
        "dq": (Tile(64, 64, 4, 3),),
        "dkv": (Tile(64, 64, 4, 1),),
        "tangent": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)),
    },
    ("tma", 2, 128): {
        "forward": (Tile(64, 128, 4, 1), Tile(64, 64, 4, 1)),
        "dq": (Tile(64, 64, 4, 3),),
        "dkv": (Tile(64, 64, 4, 2),),
        "tangent": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 1)),
    },
    ("tma", 2, 256): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dq": (Tile(64, 64, 8, 1),),
        "dkv": (Tile(32, 32, 8, 1),),
        "tangent": (Tile(32, 32, 8, 1),),
    },
    ("tma", 4, 64): {
        "forward": (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
        "dq": (Tile(64, 64, 4, 1),),
        "dkv": (Tile(32, 64, 4, 2),),
        "tangent": (Tile(64, 32, 4, 2),),
    },
    ("tma", 4, 128): {
        "forward": (Tile(128, 64, 8, 1), Tile(64, 32, 4, 1)),
        "dq": (Tile(64, 64, 4, 1),),
        "dkv": (Tile(32, 64, 4, 2),),
        "tangent": (Tile(64, 32, 4, 2),),
    },
    ("pointers", 2, 64): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
        "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dkv": (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        "tangent": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    },
    ("pointers", 2, 128): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
        "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dkv": (Tile(32, 64, 8, 2),),
        "tangent": (Tile(64, 64, 8, 2),),
    },
    ("pointers", 2, 256): {
        "forward": (Tile(64, 32, 8, 2),),
        "dq": (Tile(64, 32, 8, 2),),
        "dkv": (Tile(32, 32, 8, 1),),
        "tangent": (Tile(32, 32, 8, 1),),
    },
    ("pointers", 4, 64): {
        "forward": (Tile(64, 64, 4, 2),),
        "dq": (Tile(64, 32, 4, 2),),
        "dkv": (Tile(32, 64, 8, 1),),
        "tangent": (Tile(64, 32, 8, 1),),
    },
    ("pointers", 4, 128): {
        "forward": (Tile(64, 32, 8, 1),),
        "dq": (Tile(16, 32, 4, 1),),
        "dkv": (Tile(32, 16, 4, 1),),
        "tangent": (Tile(64, 32, 8, 1),),
    },
}
_SM100: _TABLE = {
    ("tma", 2, 64): {
        "forward": (Tile(128, 128, 8, 2), Tile(64, 64, 4, 3)),
        "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dkv": (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        "tangent": (Tile(128, 64, 8, 1), Tile(64, 64, 8, 1)),
    },
    ("tma", 2, 128): {
        "forward": (Tile(128, 128, 8, 2), Tile(64, 64, 4, 3)),
        "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dkv": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
        "tangent": (Tile(128, 64, 8, 1), Tile(64, 64, 8, 1)),
    },
    ("tma", 2, 256): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dq": (Tile(64, 64, 8, 1),),
        "dkv": (Tile(64, 64, 8, 1),),
        "tangent": (Tile(64, 64, 8, 1),),
    },
    ("tma", 4, 64): {
        "forward": (Tile(64, 32, 8, 1),),
        "dq": (Tile(64, 32, 8, 1),),
        "dkv": (Tile(32, 64, 8, 1),),
        "tangent": (Tile(64, 32, 8, 1),),
    },
    ("pointers", 2, 64): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
        "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dkv": (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        "tangent": (Tile(128, 64, 8, 1), Tile(64, 64, 8, 1)),
    },
    ("pointers", 2, 128): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
        "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "dkv": (Tile(64, 64, 8, 2),),
        "tangent": (Tile(128, 64, 8, 1), Tile(64, 64, 8, 1)),
    },
    ("pointers", 2, 256): {
        "forward": (Tile(64, 32, 8, 2),),
        "dq": (Tile(64, 32, 8, 2),),
        "dkv": (Tile(16, 64, 8, 1),),
        "tangent": (Tile(64, 32, 8, 1),),
    },
    ("pointers", 4, 64): {
        "forward": (Tile(64, 32, 8, 1),),
        "dq": (Tile(64, 32, 8, 1),),
        "dkv": (Tile(32, 64, 8, 1),),
        "tangent": (Tile(64, 32, 8, 1),),
    },
}
TABLE: dict[int, _TABLE] = {80: _SM80, 86: _SM86, 90: _SM90, 100: _SM100}


def scores_tile(element: int, width: int, of_q: int, of_k: int) -> Tile | None:
    """The tile of scores between blocks of of_q and of_k tokens, the same for every architecture. None: no tile is
    without spills or fits shared memory."""
    if element == 4:
        return Tile(32, 32, 4, 1) if width <= 64 and max(of_q, of_k) <= 32 else None
    m, n = max(of_q, 32 if width > 128 else 64), max(of_k, 32 if width > 128 else 64)
    return Tile(m, n, 8 if max(m, n) > 64 else 4, 1 if width > 128 else 2)


def architecture(capability: tuple[int, int]) -> int:
    """The table's architecture for a compute capability. Consumer GPUs since sm_86, sm_120 too, share memory limits."""
    major, minor = capability
    if major == 8:
        return 80 if minor == 0 else 86
    return {9: 90, 10: 100}.get(major, 86)


def widest(arch: int, element: int) -> int:
    """The widest heads, of elements of so many bytes, that an architecture has configurations for."""
    return max(width for _, size, width in TABLE[arch] if size == element)


def tile(arch: int, loads: Loads, element: int, width: int, kernel: Kernel, block_q: int, block_k: int) -> Tile:
    """The configuration of a kernel for a layout's blocks.

    arch: one of ARCHITECTURES.  element: bytes.  width: of q and k or v, the larger, padded to a power of two.
    """
    tiles = TABLE[arch][loads, element, max(64, width)][kernel]
    return next(t for t in tiles if t.m <= block_q and t.n <= block_k)
