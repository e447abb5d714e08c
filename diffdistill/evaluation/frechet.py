"""Fréchet distance between Gaussian fits, and its bootstrap interval."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

Array = NDArray[np.float64]
CONFIDENCE = 0.95
BLOCK = 8192  # rows: 134 MB of 2,048 features
NO_ROOT = "the Fréchet distance has no finite real matrix root; no diagonal is added to force one"


@dataclass(frozen=True)
class Moments:
    """mean [d] and cov [d, d] (divided by n - 1) of n points, both float64."""

    mean: Array
    cov: Array


def moments(values: Tensor) -> Moments:
    """Mean and covariance of values [n, ...], flattened to [n, d], accumulated in float64 a block of rows at a time."""
    mean = np.sum([block.sum(0) for block in _blocks(values)], 0) / len(values)
    second = np.zeros((len(mean), len(mean)))
    for block in _blocks(values):
        centred = block - mean
        second += centred.T @ centred
    return Moments(mean, second / (len(values) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of N(a.mean, a.cov) and N(b.mean, b.cov), by clean-fid's arithmetic.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in squared units of the values.
    Singular covariances are legal and usual: three pixels of the digit scans never vary. The root's trace feels only
    directions in which both vary, so clean-fid gets the problem in those (relative tolerance: float64's epsilon times
    d) and what lies outside is added exactly. Left in, they can make scipy's root of the product infinite (1 of 600
    random low-rank pairs); clean-fid then adds 1e-6 to both diagonals and only prints so. We pass 0 instead and raise
    ArithmeticError should it still come to that. Agrees with eigenvalues of the symmetric product to 1e-6 tr C.
    Source: Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500; Parmar et al. 2022, arXiv:2104.11222.
    """
    from cleanfid import fid  # two seconds to import

    basis = _range(b.cov)
    basis = basis @ _range(basis.T @ a.cov @ basis)
    inner_a, inner_b = (Moments(m.mean @ basis, basis.T @ m.cov @ basis) for m in (a, b))
    gap, inner_gap = a.mean - b.mean, inner_a.mean - inner_b.mean
    outside = gap @ gap - inner_gap @ inner_gap
    outside += sum(np.trace(m.cov) - np.trace(inner.cov) for m, inner in ((a, inner_a), (b, inner_b)))
    if basis.shape[1] < 2:
        # One direction needs no matrix root, and scipy's of a 1x1 answers in a form that clean-fid cannot read.
        std_a, std_b = (np.sqrt(inner.cov).sum() for inner in (inner_a, inner_b))
        return float(outside + inner_gap @ inner_gap + (std_a - std_b) ** 2)
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.filterwarnings("ignore", message="The `disp` argument", category=DeprecationWarning)
        try:
            distance = float(fid.frechet_distance(inner_a.mean, inner_a.cov, inner_b.mean, inner_b.cov, eps=0.0))
        except ValueError as error:  # clean-fid's for a root that is not real, and before scipy 1.16 its for one of inf
            raise ArithmeticError(NO_ROOT) from error
    if said.getvalue() or not np.isfinite(distance):
        raise ArithmeticError(NO_ROOT)
    return distance + float(outside)


def bootstrap_interval(
    samples: Tensor, distance: Callable[[Moments], float], *, seed: int, replicates: int = 100
) -> tuple[float, tuple[float, float]]:
    """distance(moments of samples) and its basic bootstrap interval over the samples; the reference stays fixed.

    samples: [n, ...].  replicates: number of resamplings (10,000 x 64 values: about 10 ms each on one core).
    Returns (estimate, (2 estimate - q_97.5, 2 estimate - q_2.5)), q the quantiles over the replicates.
    The interval is for the distance at infinitely many samples. It may lie wholly below the estimate and start below
    zero; it is not cut there. The reference is taken as exact: its own sampling error is not covered.
    Source: Efron & Tibshirani 1993, section 13; Davison & Hinkley 1997, section 5.2.
    """
    n = len(samples)
    estimate_at = moments(samples)
    origin = estimate_at.mean  # weighted second moments about the overall mean do not cancel
    rng = np.random.default_rng(seed)
    drawn = np.empty(replicates)
    # One thread: on small matrices numpy's waiting threads cost up to 100x when another program has the cores.
    with threadpool_limits(1, user_api="blas"):
        estimate = distance(estimate_at)
        for i in range(replicates):
            # Drawing n of n with replacement is a weighting by counts: no row is copied.
            counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
            shift, second = np.zeros_like(origin), np.zeros_like(estimate_at.cov)
            for start, block in zip(range(0, n, BLOCK), _blocks(samples), strict=True):
                centred, weights = block - origin, counts[start : start + BLOCK]
                shift += weights @ centred / n
                second += (centred * weights[:, None]).T @ centred
            drawn[i] = distance(Moments(origin + shift, (second - n * np.outer(shift, shift)) / (n - 1)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    # A distance fitted at finite n lies above the truth by about b/n, and a replicate lies above the estimate by the
    # same b/n. Percentiles of the replicates would be off by 2b/n; reflecting them about the estimate cancels both.
    return estimate, (float(2 * estimate - high), float(2 * estimate - low))


def _range(cov: Array) -> Array:
    """Orthonormal basis [d, r] of the directions in which cov [d, d] is not zero up to rounding."""
    values, vectors = np.linalg.eigh(cov)
    # `initial`: an empty matrix has no largest eigenvalue, and its range is empty.
    return vectors[:, values > values.max(initial=0.0) * len(cov) * np.finfo(np.float64).eps]


def _blocks(values: Tensor) -> Iterator[Array]:
    """Rows [n, d] in float64, BLOCK at a time: they may lie in a file larger than memory."""
    for block in values.detach().flatten(1).split(BLOCK):
        yield block.double().cpu().numpy()
