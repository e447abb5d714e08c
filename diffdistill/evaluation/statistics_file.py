"""A reference's rows in one file, to measure against later without the data; and statistics of other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.hashing import file_sha256

from .features import FeatureNetwork
from .rows import Rows
from .sources import Files, InMemory

SCHEMA = "1"


@dataclass(frozen=True)
class Statistics:
    """What a file says of a reference set.

    rows: by column; a covariance of another program's stands as features_mean and features_cov.  features, resize: of
    the network they are of, None where the file does not say.
    """

    name: str
    sha256: str
    shape: tuple[int, ...]
    size: int
    labelled: bool
    rows: Rows
    features: str | None
    resize: str | None
    law: None = None
    motion: None = None


def write_statistics(
    file: Path, rows: Rows, reference: Files | InMemory | Statistics, features: FeatureNetwork | None
) -> None:
    """Write a reference's rows with what they hold under."""
    told = {
        "schema": SCHEMA, "name": reference.name, "sha256": reference.sha256,
        "shape": json.dumps(list(reference.shape)), "size": str(reference.size),
        "labelled": json.dumps(reference.labelled),
        "features": json.dumps(None if features is None else features.sha256),
        "resize": json.dumps("none" if features is None else features.resize),
    }  # fmt: skip
    aside = file.with_name(f".{file.name}")
    save_file({name: values.contiguous() for name, values in rows.items()}, aside, told)
    aside.replace(file)


def read_statistics(path: str, shape: tuple[int, ...], key: str = "reference") -> Statistics:
    """Statistics from a .safetensors of `write_statistics`, or an .npz of clean-fid, pytorch-fid or guided-diffusion.

    An .npz holds mu [d] and sigma [d, d], or feats [n, d].  shape: of the samples, taken where the file does not say.
    Raises UserError if it holds something else.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix == ".npz":
            return _of_others(file, shape, key)
        with safe_open(file, "pt") as opened:
            told = opened.metadata() or {}
            rows = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, EOFError) as error:
        fix = "Make one with diffdistill evaluate reference=FOLDER statistics=FILE."
        raise UserError(key, f"must be statistics that can be read: {error}", path, fix) from error
    if told.get("schema") != SCHEMA:
        fix = "Make it anew with diffdistill evaluate reference=FOLDER statistics=FILE."
        raise UserError(key, f"must be statistics of schema {SCHEMA}", told.get("schema"), fix)
    return Statistics(
        told["name"], told["sha256"], tuple(json.loads(told["shape"])), int(told["size"]), json.loads(told["labelled"]),
        rows, json.loads(told["features"]), json.loads(told["resize"]),
    )  # fmt: skip


def _of_others(file: Path, shape: tuple[int, ...], key: str) -> Statistics:
    with np.load(file, allow_pickle=False) as opened:
        held: dict[str, Any] = {name: opened[name] for name in opened.files}
    rows: dict[str, Tensor] = {}
    size = 0
    if "feats" in held:
        rows["features"] = torch.from_numpy(held["feats"])
        size = len(rows["features"])
    elif {"mu", "sigma"} <= held.keys():
        rows["features_mean"] = torch.from_numpy(held["mu"]).double()
        rows["features_cov"] = torch.from_numpy(held["sigma"]).double()
    else:
        constraint = "must hold mu and sigma, or feats"
        raise UserError(key, constraint, f"{sorted(held)} in {file}", "Use statistics of clean-fid or pytorch-fid.")
    return Statistics(file.stem, file_sha256(file), shape, size, False, rows, None, None)


def require_fitting(
    statistics: Statistics, columns: frozenset[str], features: FeatureNetwork | None, shape: tuple[int, ...],
    key: str = "reference",
) -> None:  # fmt: skip
    """Refuse statistics of other features, of another size of picture, or without what the metrics need."""
    if statistics.features is not None and "features" in columns and features is not None:
        for field, theirs, ours in (
            ("features", statistics.features, features.sha256),
            ("resize", statistics.resize, features.resize),
        ):
            if theirs != ours:
                fix = "Make the statistics anew with these features, or use the network they are of."
                raise UserError(
                    f"protocol.{field}", f"must be the same for samples and {key}", f"{ours!r} and {theirs!r}", fix
                )
    dim = next((len(v) for n, v in statistics.rows.items() if n == "features_mean"), None)
    dim = statistics.rows["features"].shape[1] if "features" in statistics.rows else dim
    if "features" in columns and features is not None and dim is not None and dim != features.dim:
        fix = "Use the network that they were made with."
        raise UserError(key, f"must be statistics of {features.dim} features", dim, fix)
    values = sorted(columns & {"values", "projections", "small_frames"})
    if values and statistics.shape != shape:
        fix = "Measure against the data itself, at the samples' size."
        raise UserError(key, f"must be of samples of the shape {shape}", statistics.shape, fix)
    held = {*statistics.rows, *(["features"] if "features_cov" in statistics.rows else [])}
    if missing := sorted(columns - held):
        fix = "Make them with these metrics, or leave the metrics out that need it."
        raise UserError(key, f"must hold {missing[0]}", f"{', '.join(sorted(statistics.rows))} in the file", fix)
