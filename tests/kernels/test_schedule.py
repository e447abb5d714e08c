"""The order in which the GPU's programs start, and lists that are transposed once."""

from __future__ import annotations

import gc

import torch

from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.triton_kernels import schedule
from diffdistill.kernels.attention.triton_kernels.schedule import start_order


def test_heads_follow_each_other_longest_rows_first():
    lengths = torch.tensor([[[3, 5, 4], [4, 3, 5]]], dtype=torch.int32)
    assert start_order(lengths).tolist() == [1, 2, 0, 5, 3, 4]
    assert start_order(torch.full((2, 2, 3), 7)).tolist() == list(range(12))


def test_rows_far_longer_than_the_mean_start_before_all():
    lengths = torch.tensor([[[1, 2, 1], [1, 2, 30], [1, 20, 1]]])
    assert start_order(lengths).tolist() == [5, 7, 1, 0, 2, 4, 3, 6, 8]


def test_every_row_starts_once_and_no_row_is_empty_of_order():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 50, (2, 3, 40), generator=draw)
    assert start_order(lengths).sort().values.tolist() == list(range(240))
    assert start_order(torch.zeros(1, 2, 3, dtype=torch.int32)).tolist() == list(range(6))


def test_a_program_of_keys_works_through_the_heads_of_its_group():
    mask = torch.zeros(1, 4, 3, 2, dtype=torch.bool)
    mask[0, :2, :, 0] = True  # key head 0: block 0 is read by 6 rows
    mask[0, 3, 0, 1] = True  # key head 1: block 1 by one
    columns = schedule.of_keys(BlockLayout.from_mask(mask, 190, 120, 64, 64), 1, 2)
    assert columns.num.tolist() == [[[3, 0], [3, 0], [0, 0], [0, 1]]]
    assert columns.order.tolist() == [0, 1, 3, 2]


def test_lists_are_transposed_once_per_layout_and_forgotten_with_it():
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), 128, 128, 64, 64)
    first = schedule.of_keys(layout, 1, 1)
    again = BlockLayout.trusted(64, 64, 128, 128, layout.kv_num, layout.kv_idx)  # as the operator makes it
    assert schedule.of_keys(again, 1, 1) is first and schedule.of_keys(layout, 2, 1) is not first
    layout.kv_num[0, 0, 0] = 1
    assert schedule.of_keys(layout, 1, 1) is not first
    known = len(schedule._known)
    del layout, again
    gc.collect()
    assert len(schedule._known) < known
