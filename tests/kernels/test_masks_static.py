"""Static masks: the pairs of tokens that their papers name, whatever the order, the edges and the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from diffdistill.errors import UserError
from diffdistill.kernels.attention.masks.base import attention
from diffdistill.kernels.attention.masks.disk import Disk
from diffdistill.kernels.attention.masks.frame_tile import FrameTile
from diffdistill.kernels.attention.masks.radial import Radial, dense_enough
from diffdistill.kernels.attention.masks.sta import SlidingTile
from diffdistill.kernels.attention.masks.static import StaticMask
from diffdistill.kernels.ordering import Grid, Ordering, gilbert, raster, tiles, transposed

MASKS = {
    "sta": SlidingTile((1, 3, 1), (2, 4, 8)),
    "frame_tile": FrameTile(1, block=64),
    "disk": Disk(4, (1, 8, 8)),
    "radial": Radial(block=64),
}


def layout_of(mask, grid, heads=1):
    q = torch.zeros(1, heads, 1, 1)
    return mask.layout(q, q, grid, 1.0)


def pairs(mask, grid, heads=1):
    """bool [H, length, length] in the model's order: which tokens read which."""
    slots = mask.ordering(grid).inverse
    return layout_of(mask, grid, heads).token_mask()[0][:, slots][:, :, slots]


def coordinates(grid):
    """int64 [tokens, 3] of frame, row, column."""
    return torch.tensor(list(product(*map(range, grid.sizes))))


def with_text(video, grid):
    """bool [length, length] in the model's order: the video's pairs, and all with text."""
    sides = (grid.text, 0) if grid.text_first else (0, grid.text)
    return F.pad(video, sides * 2, value=True)


def problem(grid, heads=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, grid.length, 16, generator=draw) for _ in range(3))


# -- all of them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everything(StaticMask):
    """All blocks, in any order."""

    order: Callable[[Grid], Ordering]
    size: int = 64

    @property
    def block(self) -> int:
        return self.size

    def ordering(self, grid):
        return self.order(grid)

    def video_blocks(self, grid):
        return torch.ones(2 * (-(-self.ordering(grid).video // self.size),), dtype=torch.bool)


def tiled(tile):
    return lambda grid: tiles(grid, tile)


DENSE = {
    "raster": Everything(raster),
    "transposed": Everything(transposed),
    "gilbert": Everything(gilbert, 128),
    "tiles 4x4x4": Everything(tiled((4, 4, 4))),
    "tiles 2x8x8": Everything(tiled((2, 8, 8)), 128),
    "tiles 6x8x8": Everything(tiled((6, 8, 8)), 64),
    "sta": SlidingTile((1, 2, 2), (6, 8, 8)),
    "frame_tile": FrameTile(5),
    "disk": Disk(18, (1, 8, 16)),
}
DENSE_GRIDS = [Grid(5, 9, 10), Grid(5, 9, 10, text=70), Grid(5, 9, 10, text=3, text_first=False)]


@pytest.mark.parametrize("grid", DENSE_GRIDS, ids=["no text", "text first", "text last"])
@pytest.mark.parametrize("name", DENSE)
def test_a_mask_of_everything_is_dense_attention(name, grid):
    q, k, v = (x.requires_grad_() for x in problem(grid))
    bias = torch.randn(2, 1, grid.length, generator=torch.Generator().manual_seed(1))
    found = attention(q, k, v, grid, DENSE[name], key_bias=bias)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, None])
    torch.testing.assert_close(found, want, atol=2e-5, rtol=2e-5)
    up = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), up), torch.autograd.grad(want, (q, k, v), up), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("backend", [None, "gather"])
@pytest.mark.parametrize("name", ["sta", "disk"])
def test_what_padding_slots_hold_reaches_no_token(name, backend):
    grid, mask = Grid(3, 9, 10, text=7), MASKS[name]
    order = mask.ordering(grid)
    clean = [order.apply(x) for x in problem(grid)]
    dirty = [clean[0], *(x.masked_fill(~order.real[:, None], 1e4) for x in clean[1:])]
    found = [order.undo(mask.attend(*x, grid, backend=backend)) for x in (clean, dirty)]
    assert torch.equal(*found)
    want = F.scaled_dot_product_attention(*problem(grid), attn_mask=pairs(mask, grid))
    torch.testing.assert_close(found[0], want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["sta", "disk"])
def test_blocks_without_tokens_are_off(name):
    grid = Grid(3, 9, 10, text=7)
    tile = (2, 8, 8) if name == "sta" else (2, 4, 8)
    mask = SlidingTile((1, 2, 2), tile) if name == "sta" else Disk(100, tile)
    layout = layout_of(mask, grid)
    valid = mask.ordering(grid).valid(layout.block_k)
    assert torch.equal(layout.kv_valid, valid)
    on = layout.to_mask()[0, 0]
    assert torch.equal(on.any(1), valid > 0)
    assert torch.equal(on.any(0), valid > 0)
    if name == "sta":
        hollow = layout_of(SlidingTile((1, 1, 1), (6, 8, 8)), Grid(1, 8, 8))
        assert (hollow.kv_valid.tolist(), hollow.kv_num.tolist()) == ([64, 0, 0], [[[1, 0, 0]]])


@pytest.mark.parametrize("name", MASKS)
def test_text_attends_everything_and_everything_attends_text(name):
    for first in (True, False):
        grid = Grid(3, 20, 20, text=40, text_first=first)
        found = pairs(MASKS[name], grid)[0]
        text = slice(0, 40) if first else slice(1200, None)
        assert bool(found[text].all()) and bool(found[:, text].all())
        assert not bool(found.all())


@pytest.mark.parametrize("name", MASKS)
def test_layouts_are_made_once_and_serve_gradients_after_inference(name):
    grid = Grid(5, 12, 9)
    q, k, v = (x.requires_grad_() for x in problem(grid))
    with torch.inference_mode():
        first = MASKS[name].layout(q, k, grid, 1.0)
    assert MASKS[name].layout(q, k, Grid(5, 12, 9), 1.0) is first
    assert MASKS[name].layout(q, k, Grid(5, 12, 9, text=1), 1.0) is not first
    assert first.kv_num.shape[:2] == (1, 1)
    attention(q, k, v, grid, MASKS[name]).sum().backward()
    assert bool(v.grad.abs().sum() > 0)


def test_compiled_code_takes_the_order_and_the_layout_that_were_made():
    grid, mask = Grid(3, 9, 16, text=3), MASKS["sta"]
    want = attention(*problem(grid), grid, mask)
    torch.compiler.reset()

    @torch.compile(backend="eager")
    def compiled(q, k, v):
        return attention(q, k, v, grid, mask), mask.ordering(grid), mask.layout(q, k, grid, 1.0)

    found, order, layout = compiled(*problem(grid))
    torch.testing.assert_close(found, want)
    assert order is mask.ordering(grid) and layout is layout_of(mask, grid)


@pytest.mark.parametrize("name", MASKS)
def test_a_grid_of_other_tokens_is_refused(name):
    q = torch.zeros(1, 1, 100, 16)
    with pytest.raises(UserError, match="grid must match the sequence's 100 tokens"):
        attention(q, q, q, Grid(1, 9, 11), MASKS[name])


# -- sliding tiles --------------------------------------------------------------------------------------------


def sta_pairs(grid, window, tile):
    """By the paper's rule, token by token: a centre that is clamped, and half a window around it."""
    at = coordinates(grid) // torch.tensor(tile)
    half, numbers = torch.tensor(window) // 2, at.amax(0) + 1
    centre = torch.minimum(torch.maximum(at, half), numbers - 1 - half)
    return ((centre[:, None] - at).abs() <= half).all(-1)


@pytest.mark.parametrize(
    ("grid", "window", "tile"),
    [
        (Grid(5, 20, 24), (3, 3, 1), (1, 4, 16)),
        (Grid(3, 16, 40), (1, 1, 3), (1, 8, 8)),
        (Grid(12, 8, 24), (1, 1, 3), (6, 8, 8)),
        (Grid(5, 18, 21, text=5), (1, 3, 1), (2, 4, 8)),
        (Grid(5, 9, 40, text=70, text_first=False), (3, 1, 3), (1, 4, 16)),
    ],
)
def test_sta_is_the_papers_predicate_with_no_mixed_block(grid, window, tile):
    found = pairs(SlidingTile(window, tile), grid)
    assert torch.equal(found[0], with_text(sta_pairs(grid, window, tile), grid))


def test_sta_rows_all_have_the_window_s_tiles():
    layout = layout_of(SlidingTile((3, 3, 5), (1, 8, 8)), Grid(5, 40, 48))
    assert bool((layout.kv_num == 45).all())
    layout = layout_of(SlidingTile((3, 3, 3)), Grid(30, 48, 80))
    assert layout.block_q == 128 and bool((layout.kv_num == 27 * 3).all())
    assert layout.density == pytest.approx(27 / 300)


def test_sta_corner_tile_sees_the_window_in_its_corner():
    on = layout_of(SlidingTile((3, 3, 3), (1, 8, 8)), Grid(5, 40, 48)).to_mask()[0, 0].view(5, 5, 6, 5, 5, 6)
    assert on[0, 0, 0].nonzero().tolist() == list(map(list, product(range(3), repeat=3)))
    assert on[4, 4, 5].nonzero().tolist() == list(map(list, product((2, 3, 4), (2, 3, 4), (3, 4, 5))))
    assert on[2, 2, 3].nonzero().tolist() == list(map(list, product((1, 2, 3), (1, 2, 3), (2, 3, 4))))


def test_sta_over_tiles_is_neighbourhood_attention():
    """As NATTEN has it over tokens: of each axis the w neighbours nearest, all within the grid."""
    on = layout_of(SlidingTile((1, 3, 5), (1, 8, 8)), Grid(1, 40, 56)).to_mask()[0, 0].view(5, 7, 5, 7)
    for y, x in product(range(5), range(7)):
        rows = sorted(range(5), key=lambda i: (abs(i - y), i))[:3] if 0 < y < 4 else [abs(y - i) for i in range(3)]
        columns = [min(max(x - 2, 0), 2) + i for i in range(5)]
        assert on[y, x].nonzero().tolist() == [[i, j] for i in sorted(rows) for j in columns]


def test_sta_heads_have_their_own_windows():
    grid, tile, windows = Grid(3, 24, 24, text=9), (1, 8, 8), ((3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 3))
    found = pairs(SlidingTile(windows, tile), grid, heads=4)
    assert found.shape[0] == 4
    for head, window in enumerate(windows):
        assert torch.equal(found[head], pairs(SlidingTile(window, tile), grid)[0])
    q, k, v = problem(grid, heads=4)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=found)
    torch.testing.assert_close(attention(q, k, v, grid, SlidingTile(windows, tile)), want, atol=2e-5, rtol=2e-5)


def test_sta_values_of_lists_are_those_of_tuples():
    assert SlidingTile([3, 3, 3], [6, 8, 8]) == SlidingTile()
    assert hash(SlidingTile([[3, 3, 3], [1, 1, 1]])) == hash(SlidingTile(((3, 3, 3), (1, 1, 1))))


# -- attention tile -------------------------------------------------------------------------------------------


def frame_pairs(grid, references):
    """Same frame, or a key in one of the frames floor(i T / k)."""
    frame = coordinates(grid)[:, 0]
    shared = torch.tensor([int(f) in {i * grid.frames // references for i in range(references)} for f in frame])
    return (frame[:, None] == frame) | shared


@pytest.mark.parametrize("references", [0, 1, 2, 3, 6])
def test_frame_tile_has_the_papers_number_of_pairs(references):
    grid = Grid(6, 8, 16)
    found = pairs(FrameTile(references), grid)[0]
    assert int(found.sum()) == 128**2 * (6 * (1 + references) - references)
    assert torch.equal(found, frame_pairs(grid, references))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("sizes", [(7, 9, 11), (9, 3, 5), (3, 20, 20)])
def test_frame_tile_blocks_are_on_where_any_pair_is(sizes, block):
    grid = Grid(*sizes)
    token = frame_pairs(grid, 2)
    token = F.pad(token, (0, -grid.tokens % block) * 2)
    want = token.unflatten(1, (-1, block)).any(2).unflatten(0, (-1, block)).any(1)
    assert torch.equal(layout_of(FrameTile(2, block), grid).to_mask()[0, 0], want)


# -- disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["any", "all"])
@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        (Grid(1, 32, 48), (1, 8, 8)),
        (Grid(1, 29, 43, text=9), (1, 8, 16)),
        (Grid(3, 13, 21, text=4, text_first=False), (1, 8, 8)),
        (Grid(3, 13, 21), (2, 4, 8)),
    ],
)
def test_disk_blocks_are_any_and_all_of_the_token_predicate(grid, tile, reduce):
    places = coordinates(grid)[:, 1:]
    token = (places[:, None] - places).square().sum(-1)
    number = coordinates(grid) // torch.tensor(tile)
    same = [(number == row).all(1).nonzero()[:, 0] for row in number.unique(dim=0)]
    for radius in (17, 21.3) if reduce == "all" else (0.5, 7, 21.3):
        want = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
        for a, b in product(same, repeat=2):
            near = token[a][:, b] < radius**2
            want[a[:, None], b] = near.any() if reduce == "any" else near.all()
        assert torch.equal(pairs(Disk(radius, tile, reduce), grid)[0], with_text(want, grid))


def test_disk_is_strict():
    """The last column of the first tile and the first of the third are 9 apart."""
    on = layout_of(Disk(9, (1, 8, 8)), Grid(1, 8, 24)).to_mask()[0, 0]
    assert not bool(on[0, 2])
    assert bool(layout_of(Disk(9.01, (1, 8, 8)), Grid(1, 8, 24)).to_mask()[0, 0, 0, 2])


def test_disk_densities_are_those_of_the_docstring():
    grid = Grid(1, 64, 64)
    for tile, want in {(1, 8, 8): (0.12, 0.28, 0.65), (1, 8, 16): (0.22, 0.33, 0.71)}.items():
        found = [layout_of(Disk(radius, tile), grid).density for radius in (8, 16, 32)]
        assert found == pytest.approx(want, abs=0.01)
    assert layout_of(Disk(32, reduce="all"), grid).density == pytest.approx(0.29, abs=0.005)
    places = coordinates(grid)[:, 1:].float()
    near = [float((torch.cdist(places, places) < radius).float().mean()) for radius in (8, 16, 32)]
    assert near == pytest.approx((0.042, 0.155, 0.482), abs=0.002)


# -- radial ---------------------------------------------------------------------------------------------------


def radial_pairs(grid, mask):
    """The release's rule, pair of frames by pair of frames."""
    n = grid.height * grid.width
    place = torch.arange(n)
    apart = (place[:, None] - place).abs()
    rows = []
    for i in range(grid.frames):
        row = []
        for j in range(grid.frames):
            d = abs(i - j)
            narrow = 2 ** n.bit_length() / 2 ** d.bit_length()
            width = mask.decay * narrow if mask.decay * narrow >= mask.block else mask.block
            dropped = narrow < mask.block and d % (mask.block // narrow) != 0
            whole = d <= 1 or (mask.sink and j == 0)
            row.append(torch.ones(n, n).bool() if whole else (apart <= width) & (not dropped))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


RADIAL = [
    (Grid(9, 8, 16), Radial(block=64)),
    (Grid(5, 16, 20), Radial(decay=0.7, block=64, sink=True)),
    (Grid(13, 7, 11), Radial(block=64)),
    (Grid(12, 11, 11), Radial(decay=0.5)),
    (Grid(34, 4, 16), Radial(block=64)),
    (Grid(40, 5, 5), Radial(block=64, sink=True)),
    (Grid(3, 20, 20), Radial(decay=0.5)),
]


@pytest.mark.parametrize(("grid", "mask"), RADIAL, ids=str)
def test_radial_is_the_release_s_reduction_of_its_token_predicate(grid, mask):
    token, b = radial_pairs(grid, mask), mask.block
    found = layout_of(mask, grid).to_mask()[0, 0]
    for i, j in product(range(len(found)), repeat=2):
        columns = token[i * b : (i + 1) * b, j * b : (j + 1) * b].double().mean(0)
        some = columns[columns > 0]
        want = len(some) > 0 and int((some > 1 / 3).sum()) / len(some) > 0.6
        assert bool(found[i, j]) == want, (i, j)


def test_radial_pairs_are_dense_beside_each_other_and_symmetric_without_a_sink():
    grid = Grid(16, 8, 16)
    found = pairs(Radial(block=64), grid)[0].view(16, 128, 16, 128)
    for frame in range(16):
        near = slice(max(0, frame - 1), frame + 2)
        assert bool(found[frame, :, near].all())
    flat = found.view(2048, 2048)
    assert torch.equal(flat, flat.T) and not bool(flat.all())
    sink = pairs(Radial(block=64, sink=True), grid)[0]
    assert torch.equal(sink[:, :128], torch.ones(2048, 128).bool()) and not torch.equal(sink, sink.T)
    assert torch.equal(sink[:, 128:], flat[:, 128:])


def test_radial_grows_as_s_log_s():
    """Twice the frames add about the same number of blocks per frame each time."""
    frames = (16, 32, 64, 128)
    blocks = [int(layout_of(Radial(block=64), Grid(t, 16, 16)).kv_num.sum()) for t in frames]
    per_frame = [b / t for b, t in zip(blocks, frames, strict=True)]
    steps = [b - a for a, b in pairwise(per_frame)]
    assert all(0 < step < 0.5 * per_frame[0] for step in steps)
    assert max(steps) < 2 * min(steps)


def test_radial_keeps_a_block_whose_columns_are_mostly_dense_enough():
    """Blocks of 3 columns."""
    assert dense_enough(torch.tensor([0.5, 0.5, 0.2]), 3).tolist() == [True]  # 2/3 > 0.6
    assert dense_enough(torch.tensor([0.5, 0.0, 0.2]), 3).tolist() == [False]  # 1/2
    assert dense_enough(torch.tensor([0.4, 0.0, 0.0]), 3).tolist() == [True]  # empty columns do not count
    assert dense_enough(torch.tensor([1 / 3, 1 / 3, 1 / 3]), 3).tolist() == [False]  # not above
    assert dense_enough(torch.zeros(3), 3).tolist() == [False]
    assert dense_enough(torch.tensor([0.0, 0.0, 0.1, 0.9]), 3).tolist() == [False, True]  # a short last block
    assert dense_enough(torch.tensor([0.9, 0.9, 0.9, 0.1, 0.1]), 5).tolist() == [False]  # 0.6 is not above


# -- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingTile(tile=(6, 8, 7)), "tile must hold a multiple of 64 tokens, got .*: 336"),
        (lambda: SlidingTile(tile=(6, 8)), "tile must be three sizes >= 1"),
        (lambda: SlidingTile(window=(3, 0, 3)), "window must be three sizes >= 1"),
        (lambda: SlidingTile(window=(3, 3)), "window must be three sizes >= 1"),
        (lambda: SlidingTile(window=((3, 3, 3), (3, 3))), "window must be three sizes >= 1"),
        (lambda: SlidingTile(window=()), "window must be three sizes >= 1"),
        (lambda: FrameTile(-1), "references must be an integer >= 0, got -1"),
        (lambda: FrameTile(1.5), "references must be an integer >= 0"),
        (lambda: FrameTile(1, block=96), "block must be one of 64, 128, got 96"),
        (lambda: Disk(0), "radius must be > 0, got 0"),
        (lambda: Disk(float("inf")), "radius must be finite"),
        (lambda: Disk(8, (1, 8, 12)), "tile must hold 64 or 128 tokens"),
        (lambda: Disk(8, (1, 16, 16)), "tile must hold 64 or 128 tokens"),
        (lambda: Disk(8, reduce="most"), "reduce must be any or all"),
        (lambda: Disk(9.8, reduce="all"), "radius must exceed the tile's diagonal 9.9"),
        (lambda: Radial(decay=-1.0), "decay must be > 0"),
        (lambda: Radial(decay=0), "decay must be > 0"),
        (lambda: Radial(block=32), "block must be one of 64, 128, got 32"),
    ],
)
def test_bad_values_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (SlidingTile((1, 1, 7), (1, 8, 8)), "window must be odd and at most 5, .* in columns: .* got 7"),
        (SlidingTile((1, 1, 4), (1, 8, 8)), "window must be odd and at most 5, .* in columns: .* got 4"),
        (SlidingTile((2, 1, 1), (1, 8, 8)), "window must be odd and at most 1, .* in frames"),
        (SlidingTile(((1, 1, 1),) * 3, (1, 8, 8)), "window must be one, or one for each of the 2 heads, got 3"),
        (FrameTile(2), "references must be at most the grid's 1 frames, got 2"),
    ],
)
def test_what_does_not_fit_the_grid_is_refused_by_name(mask, message):
    grid = Grid(1, 16, 40)
    with pytest.raises(UserError, match=message):
        attention(*problem(grid), grid, mask)
