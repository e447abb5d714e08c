"""The verb precompute: captioned images to the latents and embeddings that data=latents reads.

Images are cut into chunks of a fixed size in their order; a chunk becomes one tar per bucket, then `<chunk>.json`,
which says that it is whole. A second call goes on with the chunks that are missing; of several processes (RANK,
WORLD_SIZE) each takes its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from diffdistill.captioned import Captioned, captioned, covering, nearest_bucket
from diffdistill.config import build
from diffdistill.config_errors import first_line
from diffdistill.errors import UserError, require_at_least
from diffdistill.image_folder import converted
from diffdistill.latents import CARD, NULL, missing_chunks, write_card, write_shard
from diffdistill.networks.codec import Codec
from diffdistill.networks.families.pixels import load_codec, vae_sha256
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.families.words import encoders, kept, latent_factors, told
from diffdistill.run_folder import writing

Sizes = Sequence[tuple[int, int]]


def precompute(
    path: str,
    networks: DictConfig,
    out: str,
    column: str | None,
    sizes: tuple[tuple[int, int], ...] | None,
    upscale: bool,
    negative: str | None,
    batch_size: int,
    per_chunk: int,
    max_broken: float,
    device: str | None,
    dtype: Literal["fp32", "bf16"],
    sampler: DictConfig | None = None,
) -> str:
    """Encode captioned images for training; returns the folder `out`.

    path, column: see `captioned.captioned`.  sizes: buckets as (height, width) in pixels; an image goes to the one of
    the nearest ratio, its central part is scaled down to it.  upscale: scale small images up instead of refusing them.
    negative: what the null condition is told.  per_chunk: images per unit of work.  max_broken: largest share of images
    that cannot be read; each is named in its chunk's json.  dtype: of what is stored.
    sampler: comes with the networks' file; nothing is sampled here.
    """
    require_at_least(1, batch_size=batch_size, per_chunk=per_chunk)
    if not 0 <= max_broken < 1:
        raise UserError("max_broken", "must lie in [0, 1)", max_broken, "0 refuses the first.")
    source, network, pipeline = captioned(path, column), _network(networks), str(networks["path"])
    shown, place = _sizes(network, pipeline, sizes), _device(device)
    card = {
        "pipeline": pipeline, "vae": vae_sha256(pipeline), "source": path, "images": len(source), "column": column,
        "sizes": [list(size) for size in shown], "upscale": upscale, "negative": negative, "per_chunk": per_chunk,
        "dtype": dtype,
    }  # fmt: skip
    folder = Path(out)
    _check_folder(folder, card)
    work = _Work(source, network, shown, upscale, batch_size, torch.bfloat16 if dtype == "bf16" else torch.float32)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    todo = [chunk for chunk in missing_chunks(folder, card) if chunk % world == rank]
    with writing(out, "out", "Name another place, or make room."), torch.no_grad():
        folder.mkdir(parents=True, exist_ok=True)
        if todo:
            words, codec = encoders(pipeline).to(place), load_codec(pipeline, place)
            if not (folder / CARD).is_file():  # the first of several processes
                write_card(folder, kept(network.no_words(words, negative)) | network.sized(*shown[0]), **card)
        for chunk in track(todo, "encoding", transient=True, console=Console(stderr=True)):
            first = chunk * per_chunk
            work.do(folder, chunk, range(first, min(first + per_chunk, len(source))), words, codec, max_broken)
    _report(folder, len(source), max_broken)
    return out


def _network(networks: DictConfig) -> Stock:
    """The pipeline's model without weights: its shapes say how it is told."""
    with torch.device("meta"):
        network = build(networks)
    if not isinstance(network, Stock) or "text" not in network.needs or network.dims != 3:
        fix = "Use networks=sd15, sdxl, pixart, sd3, flux, ... with networks.path."
        raise UserError("networks", "must be a text-to-image pipeline", type(network).__name__, fix)
    return network


def _sizes(network: Stock, pipeline: str, sizes: Sizes | None) -> list[tuple[int, int]]:
    """The buckets, (height, width) in pixels; without `sizes` the model's own one."""
    if sizes is not None and (not sizes or min(map(min, sizes)) < 1):
        raise UserError("sizes", "must be [[height, width], ...], each >= 1", list(sizes), "[[512,512]], say.")
    factors = latent_factors(pipeline)
    return [_shown(network, None, factors)] if sizes is None else [_shown(network, size, factors) for size in sizes]


def _shown(network: Stock, size: tuple[int, int] | None, factors: tuple[int, int]) -> tuple[int, int]:
    """Pixels of a bucket, height and width; None is the model's own."""
    try:
        return network.latents(size, 1, *factors)[1]
    except UserError as error:
        raise UserError("sizes", error.constraint, error.value, error.fix) from error


def _device(name: str | None) -> torch.device:
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError("device", "must be one that is here", repr(name), first_line(error)) from error
    return place


def _check_folder(folder: Path, card: Mapping[str, Any]) -> None:
    """Refuse a folder that holds anything else than a part of this very work."""
    file = folder / CARD
    if not folder.exists() or {entry.name for entry in folder.iterdir()} <= {NULL, f"{CARD}.part"}:
        return  # another process may be about to write the card
    if not file.is_file():
        raise UserError("out", "must be new, empty, or begun by precompute", str(folder), "Name another folder.")
    there = json.loads(file.read_text())
    for key, value in card.items():
        if there.get(key) != value:
            fix = f"It was begun with {there.get(key)!r}: name another folder, or ask for the same."
            raise UserError("out", f"must have been begun with the same {key}", value, fix)


@dataclass(frozen=True)
class _Work:
    source: Captioned
    network: Stock
    sizes: Sizes
    upscale: bool
    batch_size: int
    dtype: torch.dtype

    def do(self, folder: Path, chunk: int, images: range, words: Any, codec: Codec, max_broken: float) -> None:
        """Encode a chunk's images: a tar per bucket, then the json that says it is whole."""
        by_size: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        broken = []
        for index in images:
            try:
                size, pixels = self._pixels(index)
            except UserError:
                raise
            except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
                said = " ".join(str(error).split()) or type(error).__name__
                broken.append({"image": self.source.name(index), "error": said})
                if max_broken == 0:
                    fix = "Mend or remove it, or set max_broken, the share that may be left out."
                    constraint, found = f"must hold images that can be read: {said}", self.source.name(index)
                    raise UserError("path", constraint, found, fix) from error
            else:
                by_size.setdefault(size, []).append((index, pixels))
        for size, members in by_size.items():
            self._shard(folder / f"{chunk:06d}-{size[0]}x{size[1]}.tar", size, members, words, codec)
        report = {"samples": len(images) - len(broken), "broken": broken}
        aside = folder / f"{chunk:06d}.part"
        aside.write_text(json.dumps(report, indent=1) + "\n")
        aside.replace(folder / f"{chunk:06d}.json")

    def _pixels(self, index: int) -> tuple[tuple[int, int], Tensor]:
        """The image's bucket and its pixels, uint8 [3, height, width]."""
        with self.source.opened(index) as opened:
            image = converted(ImageOps.exif_transpose(opened), 3)
        size = nearest_bucket(image.width, image.height, self.sizes)
        if not self.upscale and (image.height < size[0] or image.width < size[1]):
            found = f"{self.source.name(index)} of {image.width}x{image.height}"
            fix = "Choose smaller sizes, remove it, or set upscale=true."
            constraint = f"must not exceed the images: none is scaled up to {size[1]}x{size[0]}"
            raise UserError("sizes", constraint, found, fix)
        return size, torch.from_numpy(np.array(covering(image, size))).permute(2, 0, 1)

    def _shard(
        self, file: Path, size: tuple[int, int], members: list[tuple[int, Tensor]], words: Any, codec: Codec
    ) -> None:
        captions = [self.source.caption(index) for index, _ in members]
        cond = told(self.network, words, captions, self.batch_size)
        stored = {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in cond.items()}
        stored |= {key: value.expand(len(members), -1) for key, value in self.network.sized(*size).items()}
        latents = []
        for first in range(0, len(members), self.batch_size):
            raw = torch.stack([pixels for _, pixels in members[first : first + self.batch_size]])
            latents.append(codec.encode(raw.to(words.device, torch.float32).div(127.5).sub(1)).cpu())
        names = [f"{index:09d}" for index, _ in members]
        write_shard(file, names, torch.cat(latents).to(self.dtype), stored, captions)


def _report(folder: Path, images: int, max_broken: float) -> None:
    """Say what is there; refuse more broken images than were allowed."""
    chunks = [json.loads(file.read_text()) for file in sorted(folder.glob("[0-9]*.json"))]
    samples, broken = sum(c["samples"] for c in chunks), [b for c in chunks for b in c["broken"]]
    if len(broken) > max_broken * images:
        found = f"{len(broken)} of {images}, the first {broken[0]['image']}: {broken[0]['error']}"
        raise UserError("max_broken", "must not be exceeded by images that cannot be read", found, "Mend them.")
    left = f", {len(broken)} images could not be read" if broken else ""
    Console().print(f"{samples} of {images} images in {folder}{left}", soft_wrap=True)
