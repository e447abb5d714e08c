"""Diversity: mean distance within conditions, in closed form."""

import math

import pytest
import torch

from diffdistill.evaluation import diversity as module
from diffdistill.evaluation.diversity import diversity


def test_it_is_the_mean_over_conditions_of_the_mean_distance_of_two_samples():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
    labels = torch.tensor([4, 4, 2, 2, 2, 7])  # distances 5; 1, 2, 3; a sample alone says nothing
    assert diversity(rows, labels) == pytest.approx((5 + 2) / 2)
    assert diversity(rows[:2], None) == pytest.approx(5)


def test_of_normal_features_it_is_the_known_mean():
    """Two points of N(0, I) in d dimensions are 2 Gamma((d + 1) / 2) / Gamma(d / 2) apart on average."""
    d = 8
    rows = 3 * torch.randn(900, d, generator=torch.Generator().manual_seed(0))
    expected = 3 * 2 * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    assert diversity(rows, None) == pytest.approx(expected, rel=0.01)


def test_a_generator_that_ignores_its_noise_has_none():
    labels = torch.arange(40) % 4
    assert diversity(torch.eye(4)[labels], labels) == 0
    assert diversity(torch.eye(4)[labels], None) > 0.9  # conditions differ, and are one here


def test_of_a_condition_the_first_samples_count(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    assert diversity(torch.tensor([[0.0], [1.0], [50.0]]), None) == pytest.approx(1)


def test_without_two_samples_of_a_condition_there_is_no_figure():
    with pytest.raises(ValueError, match="two samples of one condition"):
        diversity(torch.zeros(3, 2), torch.arange(3))
