"""The circumstances under which numbers were measured; numbers compare only where these are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from diffdistill.errors import UserError

SCHEMA = 2


@dataclass(frozen=True)
class Protocol:
    """Everything a figure depends on beside the samples themselves; written next to every set of figures.

    reference, reference_sha256, reference_size: name, hash (`tensor_sha256`) and count of the reference set.
    features: sha256 of the feature network's weights, None where none was given.
    num_samples, seed: how many samples, and the seed of the draws made while measuring (bootstrap, subsets).
    resize: how pictures become the feature network's input, in words; "none": they are taken as they are.
    clip: the range values were clipped to, None for points.
    dtype: of the samples as given.  statistics_dtype: of the means, covariances and projections.
    covariance_eps: what was added to covariance diagonals; always 0.
    interval: form and level of fd_ci and fd_pixel_ci.  replicates: bootstrap resamplings, 0 is no
    interval.
    prdc_space: "features" or "values".
    clip_model: sha256 of the weights behind clip_score, None where it was not measured.
    """

    reference: str
    reference_sha256: str
    reference_size: int
    features: str | None
    num_samples: int
    seed: int
    resize: str
    clip: tuple[float, float] | None
    dtype: str
    statistics_dtype: str
    covariance_eps: float
    interval: str
    replicates: int
    prdc_space: str
    precision_recall_k: int
    density_coverage_k: int
    kid_subsets: int
    kid_subset_size: int
    swd_projections: int
    swd_seed: int
    clip_model: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump; `from_json` inverts it."""
        plain = asdict(self)
        return {**plain, "clip": None if self.clip is None else list(self.clip)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Protocol:
        """Raises UserError if a field is missing or unknown, or of another schema version.

        Schema 1 knew no clip_score, and else the same.
        """
        if plain.get("schema") == 1:
            plain = {**plain, "clip_model": None, "schema": SCHEMA}
        if plain.get("schema") != SCHEMA:
            raise UserError("protocol.schema", f"must be {SCHEMA}", plain.get("schema"), "Evaluate the samples again.")
        names = {field.name for field in fields(cls)}
        if plain.keys() != names:
            odd = sorted(plain.keys() ^ names)
            raise UserError("protocol", "must hold exactly the fields of its schema", f"{odd} missing or unknown",
                            "Evaluate the samples again.")  # fmt: skip
        clip = plain["clip"]
        return cls(**{**plain, "clip": None if clip is None else (float(clip[0]), float(clip[1]))})


def require_same(a: Protocol, b: Protocol) -> None:
    """Refuse to compare figures of two protocols: UserError names the first field that differs, with both values."""
    for field in fields(Protocol):
        of_a, of_b = getattr(a, field.name), getattr(b, field.name)
        if of_a != of_b:
            raise UserError(f"protocol.{field.name}", "must be the same for figures that are compared",
                            f"{of_a!r} and {of_b!r}", "Evaluate both under one protocol.")  # fmt: skip


def tensor_sha256(*tensors: Tensor | None) -> str:
    """Hash of dtype, shape and bytes of the tensors in order; None counts as its own value."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()
