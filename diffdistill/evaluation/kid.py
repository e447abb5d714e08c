"""Kernel inception distance on any features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

NUM_SUBSETS = 100
MAX_SUBSET_SIZE = 1000


def kernel_distance(samples: Tensor, reference: Tensor, *, seed: int) -> float:
    """Squared MMD of features [n, d] and [m, d] with kernel (x.y / d + 1)^3, mean over 100 subsets, by clean-fid.

    Unbiased within the sets, so it may be slightly negative. Subsets have min(n, m, 1000) points and come from numpy's
    global generator, as clean-fid draws them: it is seeded here and put back as it was.
    Source: Bińkowski et al. 2018, arXiv:1801.01401; Parmar et al. 2022, arXiv:2104.11222.
    """
    from cleanfid import fid  # two seconds to import

    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        with threadpool_limits(1, user_api="blas"):  # as in `frechet.bootstrap_interval`
            return float(
                fid.kernel_distance(
                    _Rows(reference),
                    _Rows(samples),
                    num_subsets=NUM_SUBSETS,
                    max_subset_size=MAX_SUBSET_SIZE,
                )
            )
    finally:
        np.random.set_state(state)


class _Rows:
    """Features as clean-fid takes them, in float64 where it draws them: the set may be larger than memory."""

    def __init__(self, features: Tensor) -> None:
        self._features = features
        self.shape = tuple(features.shape)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._features[torch.from_numpy(index)].double().cpu().numpy()
