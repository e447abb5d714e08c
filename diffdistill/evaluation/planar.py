"""Figures of points against a law that is known: recovered modes, exact 2-Wasserstein distance, KL divergence."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

MODE_SHARE = 1 / 16  # of all samples, within MODE_RADIUS standard deviations: half of what each of eight modes holds
MODE_RADIUS = 3.0
MOST_ASSIGNED = 2000  # the assignment's time grows with the third power
NEIGHBOUR = 5


class Law(Protocol):
    """A density on points. centres: [modes, d] of its modes.  std: of a mode."""

    @property
    def centres(self) -> Tensor: ...
    @property
    def std(self) -> float: ...

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x) in nats, [n]."""
        ...


def modes(samples: Tensor, law: Law) -> tuple[int, float]:
    """How many modes hold at least 1/16 of the samples within 3 standard deviations of their centre, and the share of
    samples that near to any mode. samples: [n, d]."""
    near = torch.cdist(samples.double(), law.centres.double()) < MODE_RADIUS * law.std
    return int((near.double().mean(0) >= MODE_SHARE).sum()), float(near.any(1).double().mean())


def wasserstein(samples: Tensor, reference: Tensor) -> float:
    """2-Wasserstein distance of two clouds by optimal assignment, in the data's unit.

    samples, reference: [n, d]. The first min(n, m, 2,000) points of each: two clouds of one law are then apart too
    (about .05 for eight modes of std .05 on the unit circle, most of it from unequal counts per mode).
    """
    from scipy.optimize import linear_sum_assignment

    count = min(len(samples), len(reference), MOST_ASSIGNED)
    cost = torch.cdist(samples[:count].double(), reference[:count].double()).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(float(cost[rows, columns].mean()))


def kl(samples: Tensor, law: Law) -> float:
    """KL(samples || law) in nats: minus the samples' entropy minus their mean log density.

    The entropy is Kozachenko and Leonenko's estimate (1987) with the 5th nearest neighbour, samples [n, d] without
    repetitions; of few samples it may come out slightly negative. Repeated samples make it infinite.
    """
    from scipy.spatial import cKDTree
    from scipy.special import digamma, gammaln

    x = samples.double().numpy()
    count, dim = x.shape
    distance = torch.from_numpy(cKDTree(x).query(x, k=NEIGHBOUR + 1)[0][:, -1])
    ball = dim / 2 * math.log(math.pi) - float(gammaln(dim / 2 + 1))
    entropy = float(digamma(count) - digamma(NEIGHBOUR)) + ball + dim * float(distance.log().mean())
    return -entropy - float(law.log_density(samples.double()).mean())
