"""Captioned images as they lie on disk: a folder, or webdataset's tar shards. What `precompute` reads."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image

from diffdistill.errors import UserError, refuse_url
from diffdistill.image_folder import IMG_EXTENSIONS, images_below
from diffdistill.prompts import COLUMNS
from diffdistill.tar_shards import entries

METADATA = ("metadata.jsonl", "metadata.csv")  # of the datasets library's image folders: file_name and a caption


class Captioned(Protocol):
    """Images with captions, in a fixed order."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Of the image, for messages."""
        ...

    def caption(self, index: int) -> str: ...

    def opened(self, index: int) -> Image.Image:
        """The image, not yet decoded. Raises what PIL raises."""
        ...


def captioned(path: str, column: str | None) -> Captioned:
    """The images at `path`: a tar shard, a folder of tar shards, or a folder of images, each with a caption.

    In tar shards a sample's caption is `<key>.txt`, or `<key>.json` with `column`. Beside an image in a folder lies
    `<name>.txt`; or the folder has a metadata.jsonl or metadata.csv with file_name and `column`. column: None is the
    first of prompt, text, caption.
    Raises UserError where there are no images, or one has no caption.
    """
    refuse_url("path", path)
    place = Path(path).expanduser()
    shards = [place] if place.suffix == ".tar" and place.is_file() else sorted(place.glob("*.tar"))
    if not shards and not place.is_dir():
        raise UserError("path", "must be a folder or a tar shard", repr(path), "There is neither.")
    found: Captioned = Shards(tuple(shards), column) if shards else Folder(place, column)
    if column is not None and isinstance(found, Folder) and found.in_files:
        fix = "Leave it out: a .txt beside an image is its caption."
        raise UserError("column", "must be null for captions in files of their own", column, fix)
    if not len(found):
        fix = f"Put in files that end in {', '.join(IMG_EXTENSIONS)}, or tar shards of them."
        raise UserError("path", "must hold images", repr(path), fix)
    return found


@dataclass(frozen=True)
class Folder:
    """Images of a folder at any depth, sorted."""

    path: Path
    column: str | None

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def _files(self) -> list[Path]:
        files = images_below(self.path)
        for file in files:
            if self._told is None and not file.with_suffix(".txt").is_file():
                fix = f"Write {file.with_suffix('.txt').name} beside it, or one {METADATA[0]} with file_name and text."
                raise UserError("path", "must hold a caption for every image", f"none for {file}", fix)
            if self._told is not None and self._relative(file) not in self._told:
                fix = "Add its line."
                raise UserError("path", "must hold a caption for every image", f"none for {file} in the metadata", fix)
        return files

    @property
    def in_files(self) -> bool:
        """Whether captions lie in a file beside each image."""
        return self._told is None

    @cached_property
    def _told(self) -> dict[str, str] | None:
        """Captions by relative path, where there is a metadata file."""
        for name in METADATA:
            if (file := self.path / name).is_file():
                rows = _rows(file)
                return {str(row["file_name"]): str(row[_column(row, self.column, file)]) for row in rows}
        return None

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def name(self, index: int) -> str:
        return str(self._files[index])

    def caption(self, index: int) -> str:
        file = self._files[index]
        if self._told is not None:
            return self._told[self._relative(file)]
        return _text(file.with_suffix(".txt").read_bytes(), str(file.with_suffix(".txt")))

    def opened(self, index: int) -> Image.Image:
        return Image.open(self._files[index])


def _rows(file: Path) -> list[dict[str, object]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".csv":
            rows: list[dict[str, object]] = [dict(row) for row in csv.DictReader(io.StringIO(text))]
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError("path", "must hold metadata that can be read", str(file), str(error)) from error
    for row in rows:
        if not isinstance(row, dict) or "file_name" not in row:
            raise UserError("path", f"must hold file_name in every row of {file.name}", repr(row), "Add it.")
    return rows


def _column(row: dict[str, object], column: str | None, where: object) -> str:
    for name in COLUMNS if column is None else (column,):
        if name in row:
            return name
    raise UserError("column", f"must be in every row of {where}", column, f"There is {', '.join(row)}.")


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError("path", "must hold captions in UTF-8", where, str(error)) from error


@dataclass(frozen=True)
class Shards:
    """Samples of webdataset's tar files: members that share a name up to its first dot."""

    files: tuple[Path, ...]
    column: str | None

    def __len__(self) -> int:
        return len(self._samples)

    @cached_property
    def _samples(self) -> list[tuple[Path, str, dict[str, tuple[int, int]]]]:
        """Shard, key, and offset and bytes of each member by its extension."""
        found = []
        for file in self.files:
            for key, members in _grouped(file).items():
                if not any(f".{end}" in IMG_EXTENSIONS for end in members):
                    continue
                if "txt" not in members and "json" not in members:
                    fix = "Add KEY.txt or KEY.json."
                    raise UserError("path", "must hold a caption for every image", f"none for {file}:{key}", fix)
                found.append((file, key, members))
        return found

    def name(self, index: int) -> str:
        file, key, _ = self._samples[index]
        return f"{file}:{key}"

    def caption(self, index: int) -> str:
        if "txt" in self._samples[index][2]:
            return _text(self._read(index, "txt"), self.name(index))
        try:
            row = json.loads(self._read(index, "json"))
        except ValueError as error:
            raise UserError("path", "must hold JSON that can be read", self.name(index), str(error)) from error
        return str(row[_column(row, self.column, self.name(index))])

    def opened(self, index: int) -> Image.Image:
        end = next(end for end in self._samples[index][2] if f".{end}" in IMG_EXTENSIONS)
        return Image.open(io.BytesIO(self._read(index, end)))

    def _read(self, index: int, end: str) -> bytes:
        file, _, members = self._samples[index]
        offset, size = members[end]
        with file.open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)


def _grouped(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for member in entries(file, "path"):
        folder, _, base = member.name.rpartition("/")
        key, dot, end = base.partition(".")
        if dot and key:
            found.setdefault(f"{folder}/{key}" if folder else key, {})[end.lower()] = (member.offset_data, member.size)
    return found


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (height, width) whose ratio of sides is nearest in the logarithm, so that wide and tall are alike."""
    ratio = width / height
    return min(buckets, key=lambda size: max(ratio * size[0] / size[1], size[1] / (ratio * size[0])))


def covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The central part of the image with the sides' ratio of `size` (height, width), scaled to it (PIL's bicubic)."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
