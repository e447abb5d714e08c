"""A Hilbert curve through a box of any size: what makes runs of consecutive tokens compact.

After J. Cerveny's generalised Hilbert curve: a box is entered at a corner and left at the far end of its first axis.
It is cut into boxes that are walked in the same manner, each beginning beside the cell where the one before it ended.
"""

from __future__ import annotations

from typing import NamedTuple

Cell = tuple[int, int, int]


class Axis(NamedTuple):
    """One edge of a box: along which dimension, and how many cells, negative where it is walked backwards."""

    dimension: int
    length: int

    @property
    def size(self) -> int:
        return abs(self.length)

    @property
    def back(self) -> Axis:
        return Axis(self.dimension, -self.length)

    def cut(self) -> tuple[Axis, Axis]:
        """Two halves. The first is even where it can be: a walk along an even edge can end beside where it began."""
        half = self.size // 2
        half += half % 2 if self.size > 2 else 0
        half = half if self.length > 0 else -half
        return Axis(self.dimension, half), Axis(self.dimension, self.length - half)


class Box(NamedTuple):
    """Walked from the cell `corner` to the cell at the far end of `a`."""

    corner: Cell
    a: Axis
    b: Axis
    c: Axis


def curve(sizes: Cell) -> list[Cell]:
    """Each cell of a box of `sizes` >= 1 once, beginning at (0, 0, 0), along the longest edge.

    Neighbours on the curve share a face, but for a few steps across an edge where sizes are odd (L1 distance 2).
    """
    edges = [Axis(dimension, size) for dimension, size in enumerate(sizes)]
    edges.sort(key=lambda edge: -edge.size)  # stable: equal edges stay in order
    cells: list[Cell] = []
    boxes = [Box((0, 0, 0), *edges)]
    while boxes:
        box = boxes.pop()
        edges = [box.a, box.b, box.c]
        if any(edge.size == 0 for edge in edges):
            continue
        longer = [edge for edge in edges if edge.size > 1]
        if len(longer) < 2:
            cells += _walk(box.corner, longer[0] if longer else box.a)
        else:
            boxes += reversed(_parts(box))
    return cells


def _parts(box: Box) -> list[Box]:
    """The boxes that a box is cut into, in the order in which they are walked."""
    corner, a, b, c = box
    (a1, a2), (b1, b2), (c1, c2) = a.cut(), b.cut(), c.cut()
    if 2 * a.size > 3 * max(b.size, c.size):  # long: one half after the other
        return [Box(corner, a1, b, c), Box(_beyond(corner, a1), a2, b, c)]
    far = _last(corner, a)
    if 3 * b.size > 4 * c.size:  # flat along c: out along b, across, back along b
        return [
            Box(corner, b1, c, a1),
            Box(_beyond(corner, b1), a, b2, c),
            Box(_last(far, b1), b1.back, c, a2.back),
        ]
    if 3 * c.size > 4 * b.size:  # flat along b: the same along c
        return [
            Box(corner, c1, a1, b),
            Box(_beyond(corner, c1), a, b, c2),
            Box(_last(far, c1), c1.back, a2.back, b),
        ]
    return [
        Box(corner, b1, c1, a1),
        Box(_beyond(corner, b1), c, a1, b2),
        Box(_last(_last(corner, b1), c), a, b1.back, c2.back),
        Box(_last(_beyond(far, b1), c), c.back, a2.back, b2),
        Box(_last(far, b1), b1.back, c1, a2.back),
    ]


def _walk(corner: Cell, axis: Axis) -> list[Cell]:
    step = 1 if axis.length > 0 else -1
    return [_moved(corner, axis.dimension, i) for i in range(0, axis.length, step)]


def _beyond(cell: Cell, axis: Axis) -> Cell:
    """The first cell after an edge that begins at `cell`."""
    return _moved(cell, axis.dimension, axis.length)


def _last(cell: Cell, axis: Axis) -> Cell:
    """The last cell of an edge that begins at `cell`."""
    return _moved(cell, axis.dimension, axis.length - (1 if axis.length > 0 else -1))


def _moved(cell: Cell, dimension: int, by: int) -> Cell:
    x, y, z = cell
    if dimension == 0:
        return x + by, y, z
    return (x, y + by, z) if dimension == 1 else (x, y, z + by)
