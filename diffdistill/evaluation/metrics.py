"""The one entry to all figures: names, what each needs, and the measurement with its protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError

from . import kid, planar, prdc, sliced, tracking
from .diversity import diversity
from .features import Classifier, FeatureNetwork
from .frechet import CONFIDENCE, Moments, bootstrap_interval, frechet_distance, moments
from .motion import movement_distance
from .neighbours import memorised
from .protocol import Protocol, tensor_sha256
from .reference import Known, Reference
from .rows import Extract, Rows, columns
from .spaces import CleanFid

METRICS = (
    "fd_pixel", "fd", "kid", "prdc", "label_agreement", "memorised", "clip_score", "swd", "latency", "nfe",
    "modes", "w2", "kl", "frame_fd", "frame_fd_pixel", "velocity_error", "fid", "diversity", "motion", "peak_memory",
)  # fmt: skip
COST = ("latency", "nfe", "peak_memory")  # of a generator, whatever it makes
ON_FEATURES = ("fd", "fid", "kid", "diversity", "frame_fd")
ON_LAW = ("modes", "kl")
ON_CLIPS = ("frame_fd", "frame_fd_pixel", "velocity_error", "motion")
NOT_ON_CLIPS = ("fd_pixel", "fd", "fid", "kid", "prdc", "memorised", "swd", "diversity", "clip_score")
# A root of a matrix of so many dimensions takes milliseconds; of 2,048, seconds, and an interval needs a hundred.
DIMENSIONS_WITH_INTERVAL = 256
REPLICATES = 100

Figures = dict[str, float | list[float]]
Space = Literal["values", "features"]


def check_metrics(
    names: Iterable[str],
    reference: Known,
    features: FeatureNetwork | None,
    num_samples: int,
    *,
    classifier: Classifier | None = None,
    prompts: bool = False,
    key: str = "evaluation.metrics",
) -> None:
    """Raise UserError unless every named metric can be measured with num_samples samples against the reference.

    classifier: knows the data's classes.  prompts: whether samples have prompts.
    key: the configuration key that the names came from.
    """
    for name in names:
        check_name(name, key)
        judge = classifier if name == "label_agreement" else features
        if (lack := _lack(name, reference, judge, prompts)) is not None:
            raise UserError(key, f"must fit the data set: {name} {lack[0]}", name, lack[1])
        if num_samples < (smallest := smallest_set(name, reference, features)):
            raise UserError(key.replace("metrics", "num_samples"), f"must be at least {smallest} for the metric {name}",
                            num_samples, f"Raise it, or leave {name} out.")  # fmt: skip


def check_name(name: str, key: str) -> None:
    """Raise UserError unless there is a metric of this name; key is where it came from."""
    if name not in METRICS:
        raise UserError(key, f"must be among {', '.join(METRICS)}", name, "Take a name from that list.")


def _lack(name: str, reference: Known, features: FeatureNetwork | None, prompts: bool) -> tuple[str, str] | None:
    """What is missing to measure `name`, and what to do; None if nothing."""
    of, clips = reference.name, len(reference.shape) == 4
    if name == "clip_score" and not prompts:
        return f"needs prompts and {of} has none", "Leave it out."
    if name in ON_CLIPS and not clips:
        return f"is for clips, {of} has none", "Leave it out."
    if name in NOT_ON_CLIPS and clips:
        return "is not for clips", f"Use {', '.join(ON_CLIPS)}."
    if name in (*ON_FEATURES, "label_agreement") and features is None:
        return f"needs a feature network and {of} has none", "Leave it out; fd_pixel and swd need none."
    if name == "fid" and not isinstance(features, CleanFid):
        return "is fd on the Inception network", "Set features=inception, or ask for fd."
    if name == "label_agreement" and not reference.labelled:
        return f"needs labels and {of} has none", "Leave it out."
    if name in ON_LAW and reference.law is None:
        return f"needs the density, {of} has none", "Leave it out; swd needs none."
    if name == "velocity_error" and reference.motion is None:
        return "is for clips whose motion is known", "Leave it out."
    if name == "w2" and len(reference.shape) != 1:
        return f"is for points, {of} has images", "Leave it out; fd_pixel and swd are for images."
    if name == "motion" and reference.shape[1] < 2:
        return f"needs two frames, {of} has one", "Leave it out."
    return None


def smallest_set(name: str, reference: Known, features: FeatureNetwork | None) -> int:
    """The fewest samples that `name` can be measured on."""
    dim = 0 if features is None else features.dim
    if name == "kl":
        return planar.NEIGHBOUR + 1
    if name == "fd_pixel":
        return math.prod(reference.shape) + 1  # fewer leave the covariance singular
    if name in ("fd", "fid"):
        return dim + 1
    if name == "prdc":
        return max(prdc.PRECISION_RECALL_K, prdc.DENSITY_COVERAGE_K) + 1
    if name in ("kid", "diversity"):
        return 2
    if name in ("frame_fd", "frame_fd_pixel"):  # as fd and fd_pixel, of frames
        pixels = tracking.small_frames(torch.zeros(1, *reference.shape))[0].numel()
        return (dim if name == "frame_fd" else pixels) // reference.shape[1] + 1
    return 1


def shortfall(name: str, reference: Known) -> str | None:
    """How many samples of the reference `name` needs, in words; None if it has enough."""
    needed = {
        "fd_pixel": math.prod(reference.shape) + 1,  # fewer leave the covariance singular
        "prdc": max(prdc.PRECISION_RECALL_K, prdc.DENSITY_COVERAGE_K) + 1,
        "kid": 2,
    }.get(name, 1)
    if reference.size >= needed:
        return None
    return f"{needed} reference samples or more, {reference.name} has {reference.size}"


def usual_replicates(names: Iterable[str], reference: Known, features: FeatureNetwork | None) -> int:
    """Of the bootstrap, where nobody said: 100 while every Fréchet distance has at most 256 dimensions, else none."""
    dims = [0 if features is None else features.dim] if {"fd", "fid"} & set(names) else []
    dims += [math.prod(reference.shape)] if "fd_pixel" in names else []
    return REPLICATES if max(dims, default=0) <= DIMENSIONS_WITH_INTERVAL else 0


def measure(
    samples: Tensor,
    labels: Tensor | None,
    reference: Reference,
    metrics: Iterable[str],
    features: Classifier | None,
    *,
    seed: int,
    replicates: int = REPLICATES,
    prdc_space: Space = "values",
    key: str = "evaluation.metrics",
) -> tuple[Figures, Protocol]:
    """Measure samples against the reference; what a generator costs is the caller's to measure and ignored here.

    samples: [N, C, H, W] images, clipped to [-1, 1] as an exported pipeline does; or [N, d] points, not clipped.
    labels: [N] classes the samples were asked for, None where there are none.
    seed, replicates: of the bootstrap behind fd_ci and fd_pixel_ci.
    Returns the figures (see `figures_of`) and the protocol they hold under.
    prdc_space: whether prdc works on the values themselves or on features.
    Raises UserError as `check_metrics` does, and if a sample is not finite: nothing is replaced by a number.
    """
    names = set(metrics)
    check_metrics(sorted(names), reference, features, len(samples), classifier=features, key=key)
    check_samples(samples, labels, reference, names)
    if prdc_space == "features" and features is None and "prdc" in names:
        raise UserError("evaluation.prdc_space", f"must be values for {reference.name}, which has no feature network",
                        prdc_space, "Set it to values.")  # fmt: skip
    ours, theirs = (
        Extract(columns(names, side, prdc_space), features, features, reference.motion)
        for side in ("samples", "reference")
    )
    found = figures_of(
        names, ours(samples, labels), theirs(reference.data, reference.labels), reference,
        seed=seed, replicates=replicates, prdc_space=prdc_space,
    )  # fmt: skip
    return found, protocol_of(samples, reference, features, seed, replicates, prdc_space)


def figures_of(
    names: Iterable[str],
    ours: Rows,
    theirs: Rows,
    reference: Known,
    *,
    seed: int,
    replicates: int,
    prdc_space: Space,
) -> Figures:
    """The figures of rows of samples against rows of the reference, both as `rows.columns` asks.

    fd_pixel, fd_pixel_ci: [lo, hi], fd, fd_ci, fid, fid_ci, kid, swd, label_agreement, precision, recall, density,
    coverage, memorised, modes, mode_share, w2, kl, diversity, diversity_reference, clip_score, frame_fd,
    frame_fd_pixel, velocity_error, motion, motion_reference, motion_distance: those asked for.
    replicates: of the bootstrap, 0 is no interval.
    """
    asked, found = set(names), Figures()

    for name, column in (("fd_pixel", "values"), ("fd", "features"), ("fid", "features")):
        if name in asked:
            found |= _frechet(name, ours[column], theirs, column, seed, replicates)
    for name, column in (("frame_fd", "frames"), ("frame_fd_pixel", "small_frames")):
        if name in asked:
            a, b = (rows[column].flatten(0, 1) for rows in (ours, theirs))
            found[name] = frechet_distance(moments(a), moments(b))
    for name, column in (("label_agreement", "agreement"), ("velocity_error",) * 2, ("clip_score",) * 2):
        if name in asked:
            found[name] = float(ours[column].double().mean())
    if "kid" in asked:
        found["kid"] = kid.kernel_distance(ours["features"], theirs["features"], seed=seed)
    if "prdc" in asked:
        four = prdc.prdc(ours[prdc_space], theirs[prdc_space])
        found |= {"precision": four.precision, "recall": four.recall,
                  "density": four.density, "coverage": four.coverage}  # fmt: skip
    if "memorised" in asked:
        found["memorised"] = memorised(ours["values"], theirs["values"])
    if "swd" in asked:
        found["swd"] = sliced.distance_of_projections(ours["projections"], theirs["projections"])
    if "w2" in asked:
        found["w2"] = planar.wasserstein(ours["values"], theirs["values"])
    if "modes" in asked and reference.law is not None:
        found["modes"], found["mode_share"] = planar.modes(ours["values"], reference.law)
    if "kl" in asked and reference.law is not None:
        found["kl"] = planar.kl(ours["values"], reference.law)
    if "diversity" in asked:
        found |= _diversities(ours, theirs)
    if "motion" in asked:
        found["motion"] = float(ours["movement"].mean())
        if "movement" in theirs:
            found["motion_reference"] = float(theirs["movement"].mean())
            found["motion_distance"] = movement_distance(ours["movement"], theirs["movement"])
    return found


def _frechet(name: str, x: Tensor, theirs: Rows, column: str, seed: int, replicates: int) -> Figures:
    """Distance of rows x [n, d] from the reference's, with an interval where there are replicates."""
    if f"{column}_cov" in theirs:
        fixed = Moments(theirs[f"{column}_mean"].numpy(), theirs[f"{column}_cov"].numpy())
    else:
        fixed = moments(theirs[column])
    if replicates == 0:
        return {name: frechet_distance(moments(x), fixed)}
    distance, interval = bootstrap_interval(
        x, lambda drawn: frechet_distance(drawn, fixed), seed=seed, replicates=replicates
    )
    return {name: distance, f"{name}_ci": list(interval)}


def _diversities(ours: Rows, theirs: Rows) -> Figures:
    found: Figures = {}
    for name, rows in (("diversity", ours), ("diversity_reference", theirs)):
        if "features" in rows and "label" in rows:
            try:
                found[name] = diversity(rows["features"], rows["label"])
            except ValueError as error:
                fix = "Raise num_samples, or leave diversity out."
                raise UserError("num_samples", "must give two samples of some condition for diversity",
                                len(rows["label"]), fix) from error  # fmt: skip
    return found


def protocol_of(
    samples: Tensor,
    reference: Reference,
    features: FeatureNetwork | None,
    seed: int,
    replicates: int,
    prdc_space: Space,
) -> Protocol:
    """What figures of these samples, held in memory, hold under."""
    return circumstances(
        reference, tensor_sha256(reference.data, reference.labels), features, len(samples), seed, replicates,
        prdc_space, dtype=str(samples.dtype).removeprefix("torch."),
    )  # fmt: skip


def circumstances(
    reference: Known,
    reference_sha256: str,
    features: FeatureNetwork | None,
    num_samples: int,
    seed: int,
    replicates: int,
    prdc_space: Space,
    dtype: str = "float32",
    clip_model: str | None = None,
) -> Protocol:
    """The protocol of a measurement. clip_model: sha256 of the weights behind clip_score."""
    return Protocol(
        reference=reference.name,
        reference_sha256=reference_sha256,
        reference_size=reference.size,
        features=None if features is None else features.sha256,
        num_samples=num_samples,
        seed=seed,
        resize="none" if features is None else features.resize,
        clip=None if len(reference.shape) == 1 else (-1.0, 1.0),
        dtype=dtype,
        statistics_dtype="float64",
        covariance_eps=0.0,
        interval=f"basic bootstrap, {CONFIDENCE:.0%}",
        replicates=replicates,
        prdc_space=prdc_space,
        precision_recall_k=prdc.PRECISION_RECALL_K,
        density_coverage_k=prdc.DENSITY_COVERAGE_K,
        kid_subsets=kid.NUM_SUBSETS,
        kid_subset_size=kid.MAX_SUBSET_SIZE,
        swd_projections=sliced.NUM_PROJECTIONS,
        swd_seed=sliced.PROJECTION_SEED,
        clip_model=clip_model,
    )


def check_samples(samples: Tensor, labels: Tensor | None, reference: Known, names: set[str]) -> None:
    """Refuse samples of another shape than the reference, samples that are not finite, and missing labels."""
    if tuple(samples.shape[1:]) != reference.shape:
        raise UserError("samples", f"must have the shape of {reference.name}, {reference.shape} each",
                        tuple(samples.shape[1:]), "Nothing is resized: sample at the size of the data.")  # fmt: skip
    broken = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
    if broken:
        raise UserError("samples", "must be finite", f"{broken} of {len(samples)} samples with nan or inf",
                        "Look for the step at which the network's weights or its sampler diverged.")  # fmt: skip
    told = sorted(names & {"label_agreement", "velocity_error"})
    if told and (labels is None or labels.shape != (len(samples),)):
        raise UserError("labels", f"must be one class per sample, [{len(samples)}], for {told[0]}",
                        None if labels is None else list(labels.shape), "Pass the classes asked for.")  # fmt: skip
