"""Memorisation: the ends of its scale and its value for fresh data."""

import pytest
import torch

from diffdistill.data import digit_scans
from diffdistill.evaluation.neighbours import memorised


def test_a_resampler_of_the_scans_is_memorised_throughout():
    scans, _ = digit_scans()
    drawn = torch.randint(len(scans), (3000,), generator=torch.Generator().manual_seed(0))
    assert memorised(scans[drawn], scans) == 1.0


def test_half_of_the_scans_against_the_other_half_is_about_one_half():
    scans, _ = digit_scans()
    shares = []
    for seed in range(3):
        order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(seed))
        shares.append(memorised(scans[order[:898]], scans[order[898:]]))
    assert sum(shares) / 3 == pytest.approx(0.45, abs=0.04)


def test_on_a_line_by_hand():
    reference = torch.tensor([[0.0], [1.0], [4.0]])  # nearest other: 1, 1, 3
    samples = torch.tensor([[-0.5], [-1.5], [-1.0], [6.5], [7.5]])  # a tie is not nearer
    assert memorised(samples, reference) == 2 / 5


def test_a_copy_of_an_image_that_the_reference_holds_twice_is_memorised():
    reference = torch.tensor([[0.0], [0.0], [1.0]])
    assert memorised(torch.tensor([[0.0], [-0.9], [-1.1]]), reference) == 2 / 3
