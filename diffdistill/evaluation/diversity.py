"""How different samples of one condition are from each other: a mean distance of features within conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from .prdc import exact_distances

MOST = 1000  # samples of a condition whose pairs are taken: half a million pairs


def diversity(features: Tensor, labels: Tensor | None) -> float:
    """Mean over conditions of the mean Euclidean distance between two samples of the condition, in units of features.

    features: [n, d].  labels: condition of each, [n]; None: all have one.  Conditions of a single sample say nothing
    and are left out; of a condition the first 1,000 samples count. Raises ValueError if no condition has two.
    A generator that ignores its noise gives 0. Compare it with the teacher's from the same seeds, or the reference's.
    """
    labels = torch.zeros(len(features), dtype=torch.long) if labels is None else labels
    means = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:MOST, 0]
        if len(members) < 2:
            continue
        rows = features[members].double()
        n = len(rows)
        means.append(exact_distances(rows, rows).sum() / (n * (n - 1)))
    if not means:
        raise ValueError("diversity needs two samples of one condition")
    return float(torch.stack(means).mean())
