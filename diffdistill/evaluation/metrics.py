"""The one entry to all figures: names, what each needs, and the measurement with its protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError

from . import kid, planar, prdc, sliced, tracking
from .features import FeatureNetwork
from .frechet import CONFIDENCE, frechet_distance, frechet_with_interval, moments
from .neighbours import memorised
from .protocol import Protocol, tensor_sha256

METRICS = (
    "fd_pixel", "fd", "kid", "prdc", "label_agreement", "memorised", "clip_score", "swd", "latency", "nfe",
    "modes", "w2", "kl", "frame_fd", "frame_fd_pixel", "velocity_error",
)  # fmt: skip
ON_FEATURES = ("fd", "kid", "label_agreement", "frame_fd")
ON_LAW = ("modes", "kl")
ON_CLIPS = ("frame_fd", "frame_fd_pixel", "velocity_error")
NOT_ON_CLIPS = ("fd_pixel", "fd", "kid", "prdc", "memorised", "swd")
BLOCK = 1000

Figures = dict[str, float | list[float]]


@dataclass(frozen=True)
class Reference:
    """A fixed data set that samples are measured against.

    data: images [n, C, H, W] or clips [n, C, T, H, W] in [-1, 1], or points [n, d].  labels: [n] int64, None where the
    data has no classes.  law: the density of points, where it is known.  motion: the law of clips, where it is.
    """

    name: str
    data: Tensor
    labels: Tensor | None
    law: planar.Law | None = None
    motion: tracking.Motion | None = None


def check_metrics(
    names: Iterable[str],
    reference: Reference,
    features: FeatureNetwork | None,
    num_samples: int,
    *,
    key: str = "evaluation.metrics",
) -> None:
    """Raise UserError unless every named metric can be measured with num_samples samples against the reference.

    key: the configuration key that the names came from.
    """
    values = reference.data[0].numel()
    for name in names:
        if name not in METRICS:
            raise UserError(key, f"must be among {', '.join(METRICS)}", name, "Take a name from that list.")
        if name == "clip_score":
            raise UserError(key, f"must fit the data set: clip_score needs prompts and {reference.name} has none", name,
                            "Leave it out.")  # fmt: skip
        if name in ON_FEATURES and features is None:
            raise UserError(key, f"must fit the data set: {name} needs a feature network and {reference.name} has none",
                            name, "Leave it out; fd_pixel and swd need none.")  # fmt: skip
        if name == "label_agreement" and reference.labels is None:
            raise UserError(key, f"must fit the data set: label_agreement needs labels and {reference.name} has none",
                            name, "Leave it out.")  # fmt: skip
        if name in ON_LAW and reference.law is None:
            raise UserError(key, f"must fit the data set: {name} needs the density, {reference.name} has none",
                            name, "Leave it out; swd needs none.")  # fmt: skip
        if name == "w2" and reference.data.ndim != 2:
            raise UserError(key, f"must fit the data set: w2 is for points, {reference.name} has images",
                            name, "Leave it out; fd_pixel and swd are for images.")  # fmt: skip
        if name in ON_CLIPS and reference.motion is None:
            raise UserError(key, f"must fit the data set: {name} is for clips whose motion is known", name,
                            "Leave it out.")  # fmt: skip
        if name in NOT_ON_CLIPS and reference.data.ndim == 5:
            raise UserError(key, f"must fit the data set: {name} is not for clips", name,
                            f"Use {', '.join(ON_CLIPS)}.")  # fmt: skip
        smallest = 1
        if name == "kl":
            smallest = planar.NEIGHBOUR + 1
        elif name == "fd_pixel":
            smallest = values + 1  # fewer leave the covariance singular
        elif name == "fd":
            smallest = features.dim + 1 if features is not None else 1
        elif name == "prdc":
            smallest = max(prdc.PRECISION_RECALL_K, prdc.DENSITY_COVERAGE_K) + 1
        elif name == "kid":
            smallest = 2
        elif name in ("frame_fd", "frame_fd_pixel"):  # as fd and fd_pixel, of frames
            frames = reference.data.shape[2]
            dim = tracking.small_frames(reference.data[:1])[0].numel()
            smallest = (features.dim if name == "frame_fd" and features is not None else dim) // frames + 1
        if num_samples < smallest:
            raise UserError(key.replace("metrics", "num_samples"), f"must be at least {smallest} for the metric {name}",
                            num_samples, f"Raise it, or leave {name} out.")  # fmt: skip


def measure(
    samples: Tensor,
    labels: Tensor | None,
    reference: Reference,
    metrics: Iterable[str],
    features: FeatureNetwork | None,
    *,
    seed: int,
    replicates: int = 100,
    prdc_space: Literal["values", "features"] = "values",
    key: str = "evaluation.metrics",
) -> tuple[Figures, Protocol]:
    """Measure samples against the reference; `latency` and `nfe` are the caller's to measure and ignored here.

    samples: [N, C, H, W] images, clipped to [-1, 1] as an exported pipeline does; or [N, d] points, not clipped.
    labels: [N] classes the samples were asked for, None where there are none.
    seed, replicates: of the bootstrap behind fd_ci and fd_pixel_ci.
    Returns the figures (fd_pixel, fd_pixel_ci: [lo, hi], fd, fd_ci, kid, swd, label_agreement, precision, recall,
    density, coverage, memorised, modes, mode_share, w2, kl: those asked for) and the protocol they hold under.
    prdc_space: whether prdc works on the values themselves or on features.
    Raises UserError as `check_metrics` does, and if a sample is not finite: nothing is replaced by a number.
    """
    names = set(metrics)
    check_metrics(sorted(names), reference, features, len(samples), key=key)
    _check_samples(samples, labels, reference, names)
    x, y = reference.data.float(), samples.detach().float().cpu()
    if reference.data.ndim in (4, 5):
        x, y = x.clamp(-1, 1), y.clamp(-1, 1)

    figures: Figures = {}
    if reference.motion is not None:
        figures |= _of_clips(x, y, labels, reference.motion, names, features)
        names -= {"label_agreement"}
    if "fd_pixel" in names:
        figures["fd_pixel"], interval = frechet_with_interval(y, x, seed=seed, replicates=replicates)
        figures["fd_pixel_ci"] = list(interval)
    if "memorised" in names:
        figures["memorised"] = memorised(y, x)
    if "swd" in names:
        figures["swd"] = sliced.sliced_wasserstein(y, x)
    if "modes" in names and reference.law is not None:
        figures["modes"], figures["mode_share"] = planar.modes(y, reference.law)
    if "w2" in names:
        figures["w2"] = planar.wasserstein(y, x)
    if "kl" in names and reference.law is not None:
        figures["kl"] = planar.kl(y, reference.law)

    if prdc_space == "features" and features is None and "prdc" in names:
        raise UserError("evaluation.prdc_space", f"must be values for {reference.name}, which has no feature network",
                        prdc_space, "Set it to values.")  # fmt: skip
    space_x, space_y = x, y
    if features is not None and names & {"fd", "kid", "prdc"}:
        space_x, space_y = _by_block(features.features, x), _by_block(features.features, y)
    if features is not None and labels is not None and "label_agreement" in names:
        predicted = _by_block(features.logits, y).argmax(1)
        figures["label_agreement"] = float((predicted == labels.cpu()).double().mean())
    if "fd" in names:
        figures["fd"], interval = frechet_with_interval(space_y, space_x, seed=seed, replicates=replicates)
        figures["fd_ci"] = list(interval)
    if "kid" in names:
        figures["kid"] = kid.kernel_distance(space_y, space_x, seed=seed)
    if "prdc" in names:
        four = prdc.prdc(space_y, space_x) if prdc_space == "features" else prdc.prdc(y, x)
        figures |= {"precision": four.precision, "recall": four.recall,
                    "density": four.density, "coverage": four.coverage}  # fmt: skip

    return figures, _protocol(samples, reference, features, seed, replicates, prdc_space)


def _of_clips(
    x: Tensor,
    y: Tensor,
    labels: Tensor | None,
    motion: tracking.Motion,
    names: set[str],
    features: FeatureNetwork | None,
) -> Figures:
    """Figures of clips y against reference clips x; what they need was checked."""
    found: Figures = {}
    if "frame_fd" in names:
        assert features is not None
        ours, theirs = (_by_block(features.features, tracking.windows(clips, motion.side)) for clips in (y, x))
        found["frame_fd"] = frechet_distance(moments(ours), moments(theirs))
    if "frame_fd_pixel" in names:
        ours, theirs = (tracking.small_frames(clips) for clips in (y, x))
        found["frame_fd_pixel"] = frechet_distance(moments(ours), moments(theirs))
    if "velocity_error" in names:
        assert labels is not None
        found["velocity_error"] = tracking.velocity_error(y, labels, motion)
    if "label_agreement" in names:
        assert labels is not None and features is not None
        found["label_agreement"] = tracking.shown_agreement(y, labels, motion, features)
    return found


def _protocol(
    samples: Tensor,
    reference: Reference,
    features: FeatureNetwork | None,
    seed: int,
    replicates: int,
    prdc_space: Literal["values", "features"],
) -> Protocol:
    """What figures of these samples hold under."""
    return Protocol(
        reference=reference.name,
        reference_sha256=tensor_sha256(reference.data, reference.labels),
        reference_size=len(reference.data),
        features=None if features is None else features.sha256,
        num_samples=len(samples),
        seed=seed,
        resize="none",
        clip=(-1.0, 1.0) if reference.data.ndim in (4, 5) else None,
        dtype=str(samples.dtype).removeprefix("torch."),
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
    )


def _check_samples(samples: Tensor, labels: Tensor | None, reference: Reference, names: set[str]) -> None:
    if samples.shape[1:] != reference.data.shape[1:]:
        raise UserError("samples", f"must have the shape of {reference.name}, {tuple(reference.data.shape[1:])} each",
                        tuple(samples.shape[1:]), "Nothing is resized: sample at the size of the data.")  # fmt: skip
    broken = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
    if broken:
        raise UserError("samples", "must be finite", f"{broken} of {len(samples)} samples with nan or inf",
                        "Look for the step at which the network's weights or its sampler diverged.")  # fmt: skip
    told = sorted(names & {"label_agreement", "velocity_error"})
    if told and (labels is None or labels.shape != (len(samples),)):
        raise UserError("labels", f"must be one class per sample, [{len(samples)}], for {told[0]}",
                        None if labels is None else list(labels.shape), "Pass the classes asked for.")  # fmt: skip


@torch.no_grad()
def _by_block(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """network(images), [n, d], a block of images at a time to bound the memory of its layers."""
    return torch.cat([network(block) for block in images.split(BLOCK)])
