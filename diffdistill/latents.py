"""Latents and embedded conditions made before training: tar shards of safetensors files, as webdataset reads them.

A folder holds `*.tar`, whose members `<key>.safetensors` are one sample each: `latent` [*shape], scaled as the model
noises it, and `cond.<name>` for each condition, with the caption as metadata; all samples of a shard have one form, and
shards of another size are another bucket. Metadata `crc32` is of the whole member but itself; it is compared where it
is there. `null.safetensors` has the null condition by name, batch 1, where there is
one; `latents.json`: {"schema": 1, "pipeline": where VAE and encoders came from, "vae": hash of the VAE, or null}.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from diffdistill.data import Source, epoch_indices
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError, refuse_url
from diffdistill.evaluation.features import Classifier
from diffdistill.evaluation.reference import Reference
from diffdistill.networks.codec import Codec
from diffdistill.rng import Rng
from diffdistill.tar_shards import entries

SCHEMA = 1
CARD, NULL = "latents.json", "null.safetensors"
LATENT, COND, CAPTION, CHECKSUM = "latent", "cond.", "caption", "crc32"


@dataclass(frozen=True)
class Latents:
    """The samples of a folder, in epochs as `data.Digits`; each is read when it is drawn.

    A batch is of one bucket: an epoch is all buckets' batches in random order, the last of a bucket filled up from its
    beginning. Without x0 a bucket is drawn by its share.

    path: of the folder.  num_classes: of cond.label, for class-conditional models.  pipeline: whose VAE shows them, on
    `device`; set by `told`.
    """

    path: str
    num_classes: int = 0
    pipeline: str | None = None
    device: torch.device | str = "cpu"
    name: str = field(default="latents", init=False)
    provides: frozenset[str] = field(default=frozenset({"x0"}), init=False)
    from_files: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_url("data.path", self.path)
        if self.num_classes < 0:
            raise UserError("data.num_classes", "must be >= 0", self.num_classes, "0 is none.")
        if missing := missing_chunks(Path(self.path), self._card):
            fix = "Give diffdistill precompute the same call again: it goes on."
            raise UserError("data.path", "must be precomputed to its end", f"{len(missing)} chunks are missing", fix)
        first = self._read(0)
        if LATENT not in first:
            found = sorted(first)
            raise UserError("data.path", f"must hold samples with a tensor {LATENT}", found, "Make them again.")
        if self.num_classes and f"{COND}label" not in first:
            fix = "Set data.num_classes=0, or write cond.label."
            raise UserError("data.num_classes", "needs samples with a label", sorted(first), fix)

    def told(self, network: Any, pipeline: str | None) -> Latents:
        """The samples for a network from the pipeline folder or hub id `pipeline`.

        Raises UserError if another VAE made them.
        """
        from diffdistill.networks.families.pixels import vae_sha256

        if pipeline is None:
            return self
        wanted = self._card.get("vae")
        if wanted is not None and (found := vae_sha256(pipeline)) is not None and found != wanted:
            fix = "Precompute them with this pipeline, or train with the one they were made with."
            constraint = f"must be made with the VAE of {pipeline}, {found[:12]}"
            raise UserError("data.path", constraint, f"that of {self._card['pipeline']}, {wanted[:12]}", fix)
        device = next(network.parameters()).device
        return replace(self, pipeline=pipeline, device="cpu" if device.type == "meta" else device)

    @cached_property
    def codec(self) -> Codec | None:
        """Of the network's pipeline, loaded when something is first looked at; None: there is none to look with."""
        from diffdistill.networks.families.pixels import load_codec

        return None if self.pipeline is None or len(self.shape) < 3 else load_codec(self.pipeline, self.device)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the largest bucket's samples: what is looked at and measured."""
        return tuple(self._read(self._largest[0])[LATENT].shape)

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

    def examples(self) -> tuple[list[str], dict[str, Tensor]] | None:
        """Captions and conditions of two samples, the first and the last; None where no captions were kept."""
        chosen = [self._largest[0], self._largest[-1]]
        captions = [self._caption(index) for index in chosen]
        if None in captions:
            return None
        return [str(caption) for caption in captions], self._stacked(chosen, torch.device("cpu"))[1]

    def conditions(self, rng: Rng) -> dict[str, Tensor]:
        """Of samples of the largest bucket, drawn uniformly."""
        drawn = rng.integers(len(self._largest), (len(rng),)).tolist()
        return self._stacked([self._largest[i] for i in drawn], rng.device)[1]

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        if "x0" in needs:
            x0, cond = self._stacked(self._epoch(rng, global_batch), rng.device)
            return Batch(cond, tuple(x0.shape), x0.to(dtype))
        ends = list(itertools.accumulate(map(len, self._buckets)))
        bucket = self._buckets[bisect.bisect_right(ends, int(rng.shared().integers(ends[-1], (1,))))]
        drawn = rng.integers(len(bucket), (len(rng),)).tolist()
        cond = self._stacked([bucket[i] for i in drawn], rng.device)[1]
        return Batch(cond, (len(rng), *self._read(bucket[0])[LATENT].shape))

    def _epoch(self, rng: Rng, global_batch: int) -> list[int]:
        """Which samples those of rng are."""
        if len(self._buckets) == 1:
            return epoch_indices(rng, global_batch, len(self._members)).tolist()
        sizes = enumerate(map(len, self._buckets))
        batches = [(number, first) for number, size in sizes for first in range(0, size, global_batch)]
        epoch, place = divmod(rng.step, len(batches))
        number, first = batches[int(rng.permutation(len(batches), f"batches {epoch}")[place])]
        bucket = self._buckets[number]
        order = rng.permutation(len(bucket), f"bucket {number} epoch {epoch}")
        return [bucket[int(order[i])] for i in ((first + rng.ids) % len(bucket)).tolist()]

    def reference(self) -> Reference:
        """There is none: figures are measured on pixels."""
        fix = "Set evaluation=none; evaluate the pipeline against images."
        raise UserError("evaluation", "must be none for latents, which nobody sees", self.name, fix)

    def features(self) -> Classifier | None:
        return None

    @cached_property
    def _members(self) -> list[tuple[Path, str, int, int]]:
        """Shard, name, offset and bytes of each sample, shards in the order of their names."""
        folder = Path(self.path)
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            fix = "diffdistill precompute makes one."
            raise UserError("data.path", "must be a folder with tar shards of latents", repr(self.path), fix)
        found = [(shard, *member) for shard in shards for member in _members_of(shard)]
        if not found:
            raise UserError("data.path", "must hold samples", repr(self.path), "Its shards are empty.")
        return found

    @cached_property
    def _forms(self) -> dict[Path, dict[str, torch.Size]]:
        """Shapes of the tensors that each shard's samples have: those of its first."""
        forms: dict[Path, dict[str, torch.Size]] = {}
        for index, (shard, *_) in enumerate(self._members):
            if shard not in forms:
                sample = self._read(index)
                forms[shard] = {k: v.shape for k, v in sample.items() if k == LATENT or k.startswith(COND)}
        return forms

    @cached_property
    def _buckets(self) -> list[list[int]]:
        """Samples by the shape of their latent, in the order of the shards."""
        found: dict[Any, list[int]] = {}
        for index, (shard, *_) in enumerate(self._members):
            found.setdefault(self._forms[shard].get(LATENT), []).append(index)
        return list(found.values())

    @cached_property
    def _largest(self) -> list[int]:
        return max(self._buckets, key=len)

    def _bytes(self, index: int) -> bytes:
        shard, name, offset, size = self._members[index]
        try:
            with shard.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            fix = "Make this shard again."
            raise UserError("data.path", "must hold samples that can be read", f"{shard}:{name}", fix) from error

    def _read(self, index: int) -> dict[str, Tensor]:
        shard, name, *_ = self._members[index]
        try:
            body = self._bytes(index)
            header, values = _parts(body)
            expected = (header.get("__metadata__") or {}).get(CHECKSUM)
            if expected is not None and expected != _checksum(header, values):
                raise SafetensorError("its checksum differs")
            return load(body)
        except (SafetensorError, ValueError, AttributeError) as error:
            fix = "It is damaged: make this shard again."
            raise UserError("data.path", "must hold samples that can be read", f"{shard}:{name}", fix) from error

    def _caption(self, index: int) -> str | None:
        return _parts(self._bytes(index))[0].get("__metadata__", {}).get(CAPTION)

    def _stacked(self, chosen: list[int], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditions of samples, batch first; all have to be of their shard's form."""
        like, samples = self._forms[self._members[chosen[0]][0]], [self._read(index) for index in chosen]
        for index, sample in zip(chosen, samples, strict=True):
            if {key: value.shape for key, value in sample.items() if key in like} != like:
                shard, name, _, _ = self._members[index]
                fix = "Make this shard again."
                raise UserError("data.path", "must hold samples of one form", f"{shard}:{name} of another", fix)
        stacked = {key: torch.stack([sample[key] for sample in samples]).to(device) for key in like}
        if self.num_classes and not bool((stacked[f"{COND}label"] < self.num_classes).all()):
            found = int(stacked[f"{COND}label"].max())
            raise UserError("data.num_classes", f"must be above every label, {found} among them", self.num_classes,
                            "Raise it.")  # fmt: skip
        return stacked.pop(LATENT), {key.removeprefix(COND): value for key, value in stacked.items()}

    @cached_property
    def _card(self) -> dict[str, Any]:
        file = Path(self.path) / CARD
        try:
            card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            schema = card["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fix = "diffdistill precompute makes such folders."
            raise UserError("data.path", f"must hold a {CARD} with a schema", repr(self.path), fix) from error
        if schema != SCHEMA:
            raise UserError("data.path", f"must have schema {SCHEMA} in {CARD}", schema, "Make it again.")
        return card


def _members_of(shard: Path) -> Iterator[tuple[str, int, int]]:
    for member in entries(shard, "data.path"):
        if member.name.endswith(".safetensors"):
            yield member.name, member.offset_data, member.size


def _body(named: dict[str, Tensor], caption: str | None) -> bytes:
    """One sample as a safetensors file with its checksum."""
    metadata = {} if caption is None else {CAPTION: caption}
    plain = save(named, metadata or None)
    return save(named, {**metadata, CHECKSUM: _checksum(*_parts(plain))})


def _parts(body: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file. Raises ValueError for what is none."""
    end = 8 + int.from_bytes(body[:8], "little")
    return json.loads(body[8:end]), body[end:]


def _checksum(header: dict[str, Any], values: bytes) -> str:
    metadata = {key: value for key, value in (header.get("__metadata__") or {}).items() if key != CHECKSUM}
    told = json.dumps([{**header, "__metadata__": metadata}], sort_keys=True).encode()
    return str(zlib.crc32(values, zlib.crc32(told)))


def write_shard(
    file: Path, names: Iterable[str], latents: Tensor, cond: Mapping[str, Tensor], captions: Iterable[str | None]
) -> None:
    """Write samples [N, ...] of one form into the new tar `file`, whole or not at all. names: their keys."""
    aside = file.with_suffix(".part")
    with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i, (name, caption) in enumerate(zip(names, captions, strict=True)):
            named = {LATENT: latents[i], **{f"{COND}{key}": value[i] for key, value in cond.items()}}
            body = _body({key: value.contiguous() for key, value in named.items()}, caption)
            entry = tarfile.TarInfo(f"{name}.safetensors")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    aside.replace(file)


def write_card(folder: Path, null: Mapping[str, Tensor] | None, **card: Any) -> None:
    """Write what stands beside the shards. null: [1, ...] by name.  card: pipeline, vae and what else is to be kept."""
    if null is not None:
        save_file({key: value.contiguous() for key, value in null.items()}, folder / NULL)
    aside = folder / f"{CARD}.part"
    aside.write_text(json.dumps({"schema": SCHEMA, **card}, indent=1) + "\n")
    aside.replace(folder / CARD)


def missing_chunks(folder: Path, card: Mapping[str, Any]) -> list[int]:
    """Numbers of the chunks of precomputed images that are not whole yet; none of a folder that `write` made."""
    if "per_chunk" not in card:
        return []
    chunks = range(-(-card["images"] // card["per_chunk"]))
    return [chunk for chunk in chunks if not (folder / f"{chunk:06d}.json").is_file()]


def write(
    folder: Path,
    latents: Tensor,
    cond: Mapping[str, Tensor],
    null: Mapping[str, Tensor] | None,
    pipeline: str,
    per_shard: int = 1000,
    captions: list[str] | None = None,
) -> None:
    """Write samples [N, ...] into the new or empty folder. cond: [N, ...] by name.  null: [1, ...] by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(latents), per_shard):
        here = slice(first, min(first + per_shard, len(latents)))
        names = [f"{i:09d}" for i in range(here.start, here.stop)]
        told = captions[here] if captions is not None else [None] * len(names)
        part = {key: value[here] for key, value in cond.items()}
        write_shard(folder / f"{first // per_shard:06d}.tar", names, latents[here], part, told)
    write_card(folder, null, pipeline=pipeline, vae=None)
