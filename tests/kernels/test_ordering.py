"""Orders visit every token once, keep text last, and give back what they were given."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.kernels.gilbert import curve
from diffdistill.kernels.ordering import Grid, gilbert, raster, tiles, transposed

GRIDS = [
    Grid(1, 1, 1),
    Grid(1, 9, 7, text=5),
    Grid(3, 5, 7, text=3, text_first=False),
    Grid(3, 5, 7, text=3),
    Grid(4, 8, 8),
    Grid(5, 6, 10, text=2),
]
ORDERS = {
    "raster": raster,
    "transposed": transposed,
    "gilbert": gilbert,
    "tiles 4x4x4": lambda grid: tiles(grid, (4, 4, 4)),
    "tiles 1x8x8": lambda grid: tiles(grid, (1, 8, 8)),
    "tiles 2x3x2": lambda grid: tiles(grid, (2, 3, 2)),
}


def cells_of(grid, order):
    """(frame, row, column) of the token in each of the video's slots; (-1, -1, -1) for padding."""
    start = grid.text if grid.text_first else 0
    cells = list(product(*map(range, grid.sizes)))
    real = torch.ones(order.slots, dtype=torch.bool) if order.real is None else order.real
    found = zip(order.index.tolist(), real.tolist(), strict=True)
    return [cells[i - start] if r else (-1, -1, -1) for i, r in found][: order.video]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_order_gives_back_what_it_was_given_and_puts_text_last(grid, name):
    order = ORDERS[name](grid)
    x = torch.arange(1, grid.length + 1).view(1, 1, -1, 1)
    slots = order.apply(x)
    assert torch.equal(order.undo(slots), x)
    real = slots.flatten()[slots.flatten() > 0]
    assert real.sort().values.tolist() == list(range(1, grid.length + 1))
    first = 1 if grid.text_first else grid.tokens + 1
    assert slots.flatten()[order.video :].tolist() == list(range(first, first + grid.text))
    if order.real is None:
        assert order.slots == grid.length
    else:
        assert torch.equal(slots.flatten() > 0, order.real)


def test_tiles_are_boxes_in_raster_order_with_padding_last():
    grid, tile = Grid(3, 5, 7, text=2), (2, 3, 2)
    order = tiles(grid, tile)
    starts = product(*(range(0, size, edge) for size, edge in zip(grid.sizes, tile, strict=True)))
    want = []
    for start in starts:
        edges = zip(start, tile, grid.sizes, strict=True)
        box = list(product(*(range(at, min(at + edge, size)) for at, edge, size in edges)))
        want += box + [(-1, -1, -1)] * (12 - len(box))
    assert cells_of(grid, order) == want


@pytest.mark.parametrize("block", [3, 4, 6, 12])
def test_valid_counts_of_tiles_and_of_parts_of_tiles(block):
    grid = Grid(3, 5, 7, text=7)
    order = tiles(grid, (2, 3, 2))
    assert order.video == 2 * 2 * 4 * 12
    real = order.real.tolist() + [False] * (-order.slots % block)
    want = [sum(real[i : i + block]) for i in range(0, len(real), block)]
    assert order.valid(block).dtype == torch.int32
    assert order.valid(block).tolist() == want
    assert sum(want) == grid.length


def test_valid_counts_refuse_blocks_with_a_hole():
    order = tiles(Grid(3, 5, 7), (2, 3, 2))
    with pytest.raises(UserError, match="block must hold its real tokens first, got 24"):
        order.valid(24)
    assert tiles(Grid(2, 3, 2), (2, 3, 2)).valid(24) is None


def test_transposed_keeps_all_frames_of_a_place_together():
    grid = Grid(4, 3, 5, text=6)
    cells = cells_of(grid, transposed(grid))
    for slot, (frame, row, column) in enumerate(cells):
        assert slot == (row * 5 + column) * 4 + frame


# -- the Hilbert curve ----------------------------------------------------------------------------------------


def distances(cells):
    return [sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairwise(cells)]


def test_the_curve_visits_each_cell_of_any_box_once_in_small_steps():
    for sizes in product((1, 2, 3, 4, 5, 7, 8), repeat=3):
        cells = curve(sizes)
        assert sorted(cells) == list(product(*map(range, sizes))), sizes
        assert max(distances(cells), default=0) <= (1 if all(size % 2 == 0 for size in sizes) else 2), sizes
        assert cells[0] == (0, 0, 0)


def test_gilbert_of_a_video_is_compact():
    """ASA's grid: the numbers that the release's curve has too."""
    grid = Grid(21, 30, 52)
    cells = cells_of(grid, gilbert(grid))
    assert max(distances(cells)) == 2
    assert sum(distance == 2 for distance in distances(cells)) < len(cells) / 300
    runs = torch.tensor(cells[: len(cells) // 64 * 64]).view(-1, 64, 3)
    spans = (runs.amax(1) - runs.amin(1) + 1).float().mean(0)
    assert spans.tolist() == pytest.approx([4.8, 5.0, 4.8], abs=0.05)
    plain = torch.tensor(cells_of(grid, raster(grid))[: len(runs) * 64]).view(-1, 64, 3)
    assert (plain.amax(1) - plain.amin(1) + 1).float().mean(0).tolist() == pytest.approx([1.0, 3.1, 52], abs=0.1)


# -- caches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
def test_orders_are_made_once_and_serve_gradients_after_inference(name):
    grid = Grid(2, 5, 9, text=4, text_first=name < "t")
    with torch.inference_mode():
        first = ORDERS[name](grid)
    assert ORDERS[name](Grid(2, 5, 9, text=4, text_first=name < "t")) is first
    x = torch.randn(1, 1, grid.length, 2, requires_grad=True)
    (first.undo(first.apply(x)) * x.detach()).sum().backward()
    assert torch.equal(x.grad, x.detach())


def test_orders_are_copied_to_a_device_once():
    order = tiles(Grid(1, 9, 7), (1, 8, 8))
    assert order.on("cpu") is order
    copy = order.on("meta")
    assert copy is order.on(torch.device("meta")) and copy is not order
    assert [x.device.type for x in (copy.index, copy.inverse, copy.real)] == ["meta"] * 3
    assert order.apply(torch.empty(1, 1, 63, 2, device="meta")).shape == (1, 1, order.slots, 2)


def test_orders_are_made_of_numbers_whatever_the_default_device():
    with torch.device("meta"):
        order = tiles(Grid(1, 11, 13), (1, 8, 8))
    assert order.index.device.type == "cpu"


@pytest.mark.parametrize("tile", [(0, 8, 8), (1, 8), (1, 8, 8.0), (2, -3, 4)])
def test_bad_tiles_are_refused_by_name(tile):
    with pytest.raises(UserError, match="tile must be three sizes >= 1"):
        tiles(Grid(2, 8, 8), tile)


def test_bad_grids_are_refused_by_name():
    with pytest.raises(UserError, match="grid must have sizes >= 1"):
        Grid(0, 2, 2)
    with pytest.raises(UserError, match="grid must have .* text >= 0"):
        Grid(1, 2, 2, text=-1)
