"""Layouts and converters lose nothing, and refuse what is none."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from attention_cases import CASES, layout_of
from torch.nn.attention.flex_attention import create_block_mask

from diffdistill.errors import UserError
from diffdistill.kernels.attention.converters import from_bcsr, from_flex, to_bcsr, to_flex
from diffdistill.kernels.attention.layout import BlockLayout


def same(a, b):
    if (a.kv_valid is None) != (b.kv_valid is None):
        return False
    equal = torch.equal(a.to_mask(), b.to_mask()) and (a.kv_valid is None or torch.equal(a.kv_valid, b.kv_valid))
    return equal and all(getattr(a, n) == getattr(b, n) for n in ("block_q", "block_k", "q_len", "kv_len"))


@pytest.mark.parametrize("name", CASES)
def test_every_converter_round_trips(name):
    layout = layout_of(CASES[name])
    sizes = (layout.q_len, layout.kv_len, layout.block_q, layout.block_k, layout.kv_valid)
    assert same(BlockLayout.from_mask(layout.to_mask(), *sizes), layout)
    assert same(from_bcsr(*to_bcsr(layout), *sizes), layout)
    assert same(from_flex(to_flex(layout)), layout)


def test_lists_hold_the_mask_in_ascending_order():
    mask = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]])
    layout = BlockLayout.from_mask(mask, 3 * 64, 4 * 128, 64, 128)
    assert layout.kv_num.tolist() == [[[3, 0, 1]]]
    assert layout.kv_idx.tolist() == [[[[0, 2, 3], [0, 0, 0], [1, 0, 0]]]]
    q_num, q_idx = layout.transposed()
    assert q_num.tolist() == [[[1, 1, 1, 1]]]
    assert q_idx.tolist() == [[[[0], [2], [0], [0]]]]
    assert layout.transposed()[0] is q_num
    assert layout.density == pytest.approx(4 / 12)
    indptr, indices = to_bcsr(layout)
    assert indptr.tolist() == [[[0, 3, 3, 4]]]
    assert indices.tolist() == [0, 2, 3, 1]


def test_bcsr_of_several_heads_points_into_one_list():
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    layout = BlockLayout.from_mask(mask, 4 * 64, 5 * 64, 64, 64)
    indptr, indices = to_bcsr(layout)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                row = indices[indptr[b, h, i] : indptr[b, h, i + 1]]
                assert row.tolist() == mask[b, h, i].nonzero()[:, 0].tolist()


def test_flex_keeps_partial_and_full_blocks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block_mask = create_block_mask(lambda b, h, q, k: k < 128, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=64)
    assert from_flex(block_mask).to_mask().tolist() == [[[[True, True, False, False]] * 4]]


def test_a_mask_of_tokens_is_no_layout():
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(UserError, match="block_mask must mask whole blocks"):
        from_flex(block_mask)


def test_smaller_blocks_hold_the_same_tokens_and_larger_ones_no_fewer():
    for name in ("ragged", "valid counts", "plain"):
        layout = layout_of(CASES[name])
        for sizes in ((64, 64), (64, 128), (128, 64), (128, 128)):
            if layout.kv_valid is not None and sizes[1] > layout.block_k:
                continue
            other = layout.with_blocks(*sizes)
            assert (other.block_q, other.block_k) == sizes
            if sizes[0] <= layout.block_q and sizes[1] <= layout.block_k:
                assert torch.equal(other.token_mask(), layout.token_mask())
                assert same(other.with_blocks(layout.block_q, layout.block_k), layout)
            else:
                assert bool((other.token_mask() | ~layout.token_mask()).all())
                assert bool((other.to_mask() == other.with_blocks(64, 64).with_blocks(*sizes).to_mask()).all())


def test_larger_blocks_refuse_valid_counts_with_a_hole():
    valid = torch.tensor([10, 64], dtype=torch.int32)
    layout = BlockLayout.full(64, 128, 64, 64, valid)
    with pytest.raises(UserError, match="block_k must allow larger blocks"):
        layout.with_blocks(64, 128)
    whole = BlockLayout.full(64, 128, 64, 64, torch.tensor([64, 30], dtype=torch.int32))
    assert whole.with_blocks(64, 128).kv_valid.tolist() == [94]


def test_token_mask_follows_valid_counts_and_ragged_ends():
    layout = BlockLayout.full(3, 130, 64, 64, torch.tensor([64, 1, 2], dtype=torch.int32))
    assert layout.token_mask().shape == (1, 1, 3, 130)
    assert layout.token_mask()[0, 0, 0].nonzero()[:, 0].tolist() == [*range(65), 128, 129]
    assert layout.density == 1.0


def test_a_layout_cannot_be_changed():
    layout = BlockLayout.full(64, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.q_len = 3


def made(**changes):
    arguments = {
        "block_q": 64, "block_k": 64, "q_len": 128, "kv_len": 192,
        "kv_num": torch.tensor([[[2, 1]]], dtype=torch.int32),
        "kv_idx": torch.tensor([[[[0, 2], [1, 0]]]], dtype=torch.int32),
    }  # fmt: skip
    return BlockLayout(**(arguments | changes))


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_q": 32}, "block_q must be one of 64, 128, got 32"),
        ({"block_k": 96}, "block_k must be one of 64, 128, got 96"),
        ({"q_len": 0}, "q_len must be an integer >= 1, got 0"),
        ({"kv_len": 1.5}, "kv_len must be an integer >= 1"),
        ({"q_len": 129}, r"kv_num must be \[B, H, 3\]"),
        ({"kv_num": torch.tensor([[[2, 1]]])}, "kv_num must be an int32 tensor of 3 dim"),
        ({"kv_num": ints([2, 1])}, "kv_num must be an int32 tensor of 3 dim"),
        ({"kv_num": [[[2, 1]]]}, "kv_num must be an int32 tensor"),
        ({"kv_num": ints([[[3, 1]]])}, r"kv_num must lie in \[0, 2\]"),
        ({"kv_num": ints([[[-1, 1]]])}, r"kv_num must lie in \[0, 2\]"),
        ({"kv_idx": ints([[[[0, 3], [1, 0]]]])}, r"kv_idx must lie in \[0, 3\), got 0 to 3"),
        ({"kv_idx": ints([[[[0, 2], [1, -1]]]])}, r"kv_idx must lie in \[0, 3\), got -1 to 2. Fill"),
        ({"kv_idx": ints([[[[2, 0], [1, 0]]]])}, "kv_idx must ascend strictly .* unsorted"),
        ({"kv_idx": ints([[[[2, 2], [1, 0]]]])}, "kv_idx must ascend strictly .* a duplicate"),
        ({"kv_idx": ints([[[[0, 2]]]])}, r"kv_idx must be \[1, 1, 2, max >= 1\]"),
        ({"kv_valid": ints([1, 2])}, r"kv_valid must be \[3\]"),
        ({"kv_valid": ints([1, 2, 65])}, r"kv_valid must lie in \[0, 64\]"),
        ({"kv_len": 190, "kv_valid": ints([1, 2, 63])}, r"kv_valid must lie in .* kv_len = 190"),
        ({"kv_valid": ints([1, -2, 3])}, "kv_valid must lie in"),
    ],
)
def test_bad_lists_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        made(**changes)
    made()


def test_bad_masks_and_pointers_are_refused_by_name():
    with pytest.raises(UserError, match=r"mask must be bool \[.., 2, 3\]"):
        BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), 128, 192, 64, 64)
    with pytest.raises(UserError, match="mask must be bool"):
        BlockLayout.from_mask(torch.ones(2, 3), 128, 192, 64, 64)
    with pytest.raises(UserError, match="block_q"):
        BlockLayout.full(128, 128, block_q=100)
    with pytest.raises(UserError, match="indptr must ascend from 0 to at most 2"):
        from_bcsr(ints([0, 1, 3]), ints([0, 1]), 128, 192, 64, 64)
    with pytest.raises(UserError, match="indptr must ascend"):
        from_bcsr(ints([0, 2, 1]), ints([0, 1]), 128, 192, 64, 64)
    with pytest.raises(UserError, match="kv_idx must ascend"):
        from_bcsr(ints([0, 2, 2]), ints([1, 0]), 128, 192, 64, 64)
    with pytest.raises(UserError, match="indptr must be"):
        from_bcsr(ints(3), ints([1, 0]), 128, 192, 64, 64)


def test_valid_counts_of_any_strides_are_kept_in_one_piece():
    spaced = torch.tensor([64, 0, 30, 0], dtype=torch.int32)[::2]
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), 128, 128, 64, 64, spaced)
    assert layout.kv_valid.is_contiguous() and layout.kv_valid.tolist() == [64, 30]
