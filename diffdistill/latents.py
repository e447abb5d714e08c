"""Latents and embedded conditions made before training: tar shards of safetensors files, as webdataset reads them.

A folder holds `*.tar`, whose members `<key>.safetensors` are one sample each: `latent` [*shape], scaled as the model
noises it, and `cond.<name>` for each condition; `null.safetensors` with the null condition by name, batch 1, where
there is one; and `latents.json`: {"schema": 1, "pipeline": where the VAE and the encoders came from}.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from diffdistill.data import Source, epoch_indices
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError
from diffdistill.evaluation.features import FeatureNetwork
from diffdistill.evaluation.metrics import Reference
from diffdistill.rng import Rng

SCHEMA = 1
CARD, NULL = "latents.json", "null.safetensors"
LATENT, COND = "latent", "cond."


@dataclass(frozen=True)
class Latents:
    """The samples of a folder, in epochs as `data.Digits`; each is read when it is drawn.

    path: of the folder.  num_classes: of cond.label, for class-conditional models.
    """

    path: str
    num_classes: int = 0
    name: str = field(default="latents", init=False)
    latent: bool = field(default=True, init=False)  # nothing to look at as it is
    provides: frozenset[str] = field(default=frozenset({"x0"}), init=False)

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise UserError("data.num_classes", "must be >= 0", self.num_classes, "0 is none.")
        self._check_card()
        first = self._read(0)
        if LATENT not in first:
            found = sorted(first)
            raise UserError("data.path", f"must hold samples with a tensor {LATENT}", found, "Make them again.")
        if self.num_classes and f"{COND}label" not in first:
            fix = "Set data.num_classes=0, or write cond.label."
            raise UserError("data.num_classes", "needs samples with a label", sorted(first), fix)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._read(0)[LATENT].shape)

    @property
    def source(self) -> Source:
        return Source(f"{len(self._members)} latents", "unknown")

    @cached_property
    def null(self) -> dict[str, Tensor] | None:
        """The condition of no prompt, batch 1, where the folder has one."""
        file = Path(self.path) / NULL
        if not file.is_file():
            return None
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError("data.path", f"must hold a {NULL} that can be read", self.path, "Make it again.") from error

    def conditions(self, rng: Rng) -> dict[str, Tensor]:
        """Of samples drawn uniformly."""
        return self._stacked(rng.integers(len(self._members), (len(rng),)).tolist(), rng.device)[1]

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        shape = (len(rng), *self.shape)
        if "x0" not in needs:
            return Batch(self.conditions(rng), shape)
        chosen = epoch_indices(rng, global_batch, len(self._members)).tolist()
        x0, cond = self._stacked(chosen, rng.device)
        return Batch(cond, shape, x0.to(dtype))

    def reference(self) -> Reference:
        """There is none: figures are measured on pixels."""
        fix = "Set evaluation=none; evaluate the pipeline against images."
        raise UserError("evaluation", "must be none for latents, which nobody sees", self.name, fix)

    def features(self) -> FeatureNetwork | None:
        return None

    @cached_property
    def _members(self) -> list[tuple[Path, str, int, int]]:
        """Shard, name, offset and bytes of each sample, shards in the order of their names."""
        folder = Path(self.path)
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            fix = "diffdistill.latents.write makes one."
            raise UserError("data.path", "must be a folder with tar shards of latents", repr(self.path), fix)
        found = [(shard, *member) for shard in shards for member in _members_of(shard)]
        if not found:
            raise UserError("data.path", "must hold samples", repr(self.path), "Its shards are empty.")
        return found

    def _read(self, index: int) -> dict[str, Tensor]:
        shard, name, offset, size = self._members[index]
        try:
            with shard.open("rb") as file:
                file.seek(offset)
                return load(file.read(size))
        except (OSError, SafetensorError) as error:
            fix = "Make this shard again."
            raise UserError("data.path", "must hold samples that can be read", f"{shard}:{name}", fix) from error

    def _stacked(self, chosen: list[int], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditions of samples, batch first; all have to be of the first sample's form."""
        like, samples = self._form, [self._read(index) for index in chosen]
        for index, sample in zip(chosen, samples, strict=True):
            if {key: value.shape for key, value in sample.items() if key in like} != like:
                shard, name, _, _ = self._members[index]
                fix = "Keep other sizes in another folder."
                raise UserError("data.path", "must hold samples of one form", f"{shard}:{name} of another", fix)
        stacked = {key: torch.stack([sample[key] for sample in samples]).to(device) for key in like}
        if self.num_classes and not bool((stacked[f"{COND}label"] < self.num_classes).all()):
            found = int(stacked[f"{COND}label"].max())
            raise UserError("data.num_classes", f"must be above every label, {found} among them", self.num_classes,
                            "Raise it.")  # fmt: skip
        return stacked.pop(LATENT), {key.removeprefix(COND): value for key, value in stacked.items()}

    @cached_property
    def _form(self) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in self._read(0).items() if key == LATENT or key.startswith(COND)}

    def _check_card(self) -> None:
        file = Path(self.path) / CARD
        try:
            schema = json.loads(file.read_text(encoding="utf-8"))["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fix = "diffdistill.latents.write makes such folders."
            raise UserError("data.path", f"must hold a {CARD} with a schema", repr(self.path), fix) from error
        if schema != SCHEMA:
            raise UserError("data.path", f"must have schema {SCHEMA} in {CARD}", schema, "Make it again.")


def _members_of(shard: Path) -> Iterator[tuple[str, int, int]]:
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".safetensors"):
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise UserError("data.path", "must hold tar shards that can be read", str(shard), str(error)) from error


def write(
    folder: Path,
    latents: Tensor,
    cond: Mapping[str, Tensor],
    null: Mapping[str, Tensor] | None,
    pipeline: str,
    per_shard: int = 1000,
) -> None:
    """Write samples [N, ...] into the new or empty folder. cond: [N, ...] by name.  null: [1, ...] by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(latents), per_shard):
        with tarfile.open(folder / f"{first // per_shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for i in range(first, min(first + per_shard, len(latents))):
                named = {LATENT: latents[i], **{f"{COND}{key}": value[i] for key, value in cond.items()}}
                body = save({key: value.contiguous() for key, value in named.items()})
                entry = tarfile.TarInfo(f"{i:09d}.safetensors")
                entry.size = len(body)
                archive.addfile(entry, io.BytesIO(body))
    if null is not None:
        save_file({key: value.contiguous() for key, value in null.items()}, folder / NULL)
    (folder / CARD).write_text(json.dumps({"schema": SCHEMA, "pipeline": pipeline}, indent=1) + "\n")
