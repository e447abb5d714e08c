"""Kernel distance against its formula, and the global generator it must leave alone."""

import numpy as np
import pytest
import torch

from diffdistill.evaluation.kid import kernel_distance


def test_equals_the_unbiased_estimate_of_the_cubic_kernel():
    rng = torch.Generator().manual_seed(0)
    y, x = 0.5 + torch.randn(30, 4, generator=rng).double(), torch.randn(30, 4, generator=rng).double()

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    off = 1 - torch.eye(30, dtype=torch.float64)
    defined = ((kernel(y, y) + kernel(x, x)) * off).sum() / (30 * 29) - 2 * kernel(y, x).mean()
    assert kernel_distance(y, x, seed=0) == pytest.approx(float(defined), rel=1e-9)


def test_seeds_the_global_generator_and_puts_it_back():
    y, x = (
        torch.randn(90, 3, generator=torch.Generator().manual_seed(0)),
        torch.randn(40, 3, generator=torch.Generator().manual_seed(1)),
    )
    np.random.seed(5)
    expected = np.random.get_state()[1].copy()
    first = kernel_distance(y, x, seed=1)
    assert (np.random.get_state()[1] == expected).all()
    assert kernel_distance(y, x, seed=1) == first
    assert kernel_distance(y, x, seed=2) != first
