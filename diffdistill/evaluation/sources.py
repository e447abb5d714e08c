"""Where samples come from, a few at a time: a generator, a folder of images or clips, a data set in memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from diffdistill.captioned import Folder
from diffdistill.config_errors import first_line
from diffdistill.data import Data
from diffdistill.errors import UserError
from diffdistill.hashing import file_sha256
from diffdistill.image_folder import converted, images_below
from diffdistill.solvers import Sampler

from .harness import draw
from .protocol import tensor_sha256
from .reference import Described, Reference

READERS = 8  # threads: PIL lets go of the interpreter while it decodes


@dataclass(frozen=True)
class Drawn:
    """samples: [n, *shape], images and clips in [-1, 1].  labels: [n] int64.  prompts: of each."""

    samples: Tensor
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None


class Source(Described, Protocol):
    """Samples by number. prompted: whether each comes with a prompt.  identity: all that decides them, JSON values."""

    @property
    def prompted(self) -> bool: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...

    def draw(self, ids: range) -> Drawn:
        """The samples of these numbers, the same whatever was drawn before."""
        ...


@dataclass(frozen=True)
class Generated:
    """A sampler's draws. weights: what tells it from another.  batch_size: samples at a time, which decides nothing
    but speed."""

    name: str
    sampler: Sampler
    data: Data
    size: int
    seed: int
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    weights: Callable[[], Mapping[str, Any]]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.draw(range(1)).samples.shape[1:])

    @property
    def labelled(self) -> bool:
        return bool(self.data.num_classes)

    @property
    def prompted(self) -> bool:
        return hasattr(self.data, "texts")

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self.name, **self.weights()}

    def draw(self, ids: range) -> Drawn:
        with torch.no_grad():
            samples, labels = draw(
                self.sampler, self.data, len(ids), self.seed, self.batch_size, self.device, self.dtype, first=ids.start
            )
        texts = getattr(self.data, "texts", None)
        prompts = None if texts is None or labels is None else [texts[label] for label in labels.tolist()]
        return Drawn(samples, labels, prompts)


@dataclass(frozen=True)
class InMemory:
    """A data set's own reference."""

    reference: Reference

    @property
    def name(self) -> str:
        return self.reference.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reference.shape

    @property
    def size(self) -> int:
        return self.reference.size

    @property
    def labelled(self) -> bool:
        return self.reference.labelled

    @property
    def prompted(self) -> bool:
        return False

    @cached_property
    def sha256(self) -> str:
        return tensor_sha256(self.reference.data, self.reference.labels)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"data": self.name, "sha256": self.sha256}

    def draw(self, ids: range) -> Drawn:
        labels = self.reference.labels
        return Drawn(
            self.reference.data[ids.start : ids.stop], None if labels is None else labels[ids.start : ids.stop]
        )


@dataclass(frozen=True)
class Files:
    """Images or clips of a folder, in the order of their content: names and dates decide nothing.

    path: of the folder; a class or condition is a folder directly below it (labels 0, 1, ... by sorted name), or there
    are none. A clip is a folder of its frames, sorted by name, or an animated GIF, PNG or WebP.
    clips: whether it holds clips.  channels: 1 or 3 (see ImageFolder).  side: crop the central square and scale it to
    so many pixels; None takes pictures as they are, all of one size.
    corrupt_share: of files that may be damaged; they are named and left out.  captions: whether each has a caption (as
    `captioned.Folder` finds it).  limit: how many count, None is all.  key: configuration key of the folder.
    Everything is read once here: a damaged file, mixed sizes and missing captions are told before any work.
    """

    path: str
    clips: bool = False
    channels: Literal[1, 3] = 3
    side: int | None = None
    corrupt_share: float = 0.0
    captions: bool = False
    limit: int | None = None
    key: str = "samples"
    damaged: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.path or not Path(self.path).expanduser().is_dir():
            raise UserError(self.key, "must be a folder of images", self.path or "nothing", "There is no such folder.")
        self._items  # noqa: B018 - read here, before any work

    @property
    def name(self) -> str:
        return Path(self.path).expanduser().resolve().name

    @property
    def shape(self) -> tuple[int, ...]:
        return self._items[0].shape

    @property
    def size(self) -> int:
        return len(self._items)

    @property
    def labelled(self) -> bool:
        return self._items[0].label is not None

    @property
    def prompted(self) -> bool:
        return self.captions

    @cached_property
    def sha256(self) -> str:
        """Of all content with its labels."""
        listed = [f"{item.sha256} {item.label}\n" for item in self._items]
        return hashlib.sha256("".join(listed).encode()).hexdigest()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"sha256": self.sha256, "clips": self.clips, "channels": self.channels, "side": self.side}

    def draw(self, ids: range) -> Drawn:
        items = self._items[ids.start : ids.stop]
        samples = torch.stack([self._read(item.files) for item in items]).float().div(127.5).sub(1)
        labels = torch.tensor([item.label for item in items]) if self.labelled else None
        return Drawn(samples, labels, [item.caption for item in items] if self.captions else None)

    @cached_property
    def _items(self) -> list[_Item]:
        """Whole samples in the order of their content."""
        found = self._found()
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(self._whole, found))
        whole = sorted((item for item in read if isinstance(item, _Item)), key=lambda item: (item.sha256, item.label))
        self.damaged.extend(text for text in read if isinstance(text, str))
        self._check(whole, len(read))
        return whole[: self.limit]

    def _found(self) -> list[tuple[tuple[Path, ...], int | None, str]]:
        """Files, label and caption of every sample, damaged ones too."""
        root = Path(self.path).expanduser()
        kind = "clips" if self.clips else "images"
        inner = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        every = self._samples_in(root, inner)
        if not every:
            raise UserError(self.key, f"must hold {kind}", f"none in {self.path}", "Name the folder they lie in.")
        captions = _captions(root, self.key) if self.captions else {}
        parents = {files[0].parent.parent if self.clips and len(files) > 1 else files[0].parent for files in every}
        labelled = root not in parents and not self.captions
        texts = sorted(set(captions.values()))  # a condition of its own each
        if root in parents and len(parents) > 1 and not self.captions:
            fix = f"Lay all {kind} into folders of their class, or none."
            raise UserError(self.key, f"must hold {kind} in folders of their class, or without", self.path, fix)
        found = []
        for files in every:
            below = files[0].relative_to(root).parts[0]
            label = [entry.name for entry in inner].index(below) if labelled else None
            caption = captions.get(str(files[0]), "")
            found.append((files, texts.index(caption) if self.captions else label, caption))
        return found

    def _samples_in(self, root: Path, inner: Sequence[Path]) -> list[tuple[Path, ...]]:
        """The files of each sample: one image, or the frames of a clip."""
        files = images_below(root)
        if not self.clips:
            return [(file,) for file in files]
        files = sorted({*files, *(file for file in root.rglob("*.gif") if not file.name.startswith("."))})
        moving = [(file,) for file in files if _frames_of(file) > 1]
        still: dict[Path, list[Path]] = {}
        for file in files:
            if (file,) not in moving:
                still.setdefault(file.parent, []).append(file)
        if root in still:
            fix = "A clip is a folder of its frames, or an animated GIF, PNG or WebP."
            raise UserError(self.key, "must hold clips", f"single frames in {self.path}", fix)
        return sorted([*moving, *(tuple(frames) for frames in still.values())])

    def _whole(self, found: tuple[tuple[Path, ...], int | None, str]) -> _Item | str:
        """The sample read once, or what is wrong with it."""
        files, label, caption = found
        try:
            shape = tuple(self._read(files).shape)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
            return f"{files[0]} ({first_line(error) or type(error).__name__})"
        digest = hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()
        return _Item(files, digest, shape, label, caption)

    def _read(self, files: Sequence[Path]) -> Tensor:
        """uint8 [C, H, W], or [C, T, H, W] of a clip."""
        if not self.clips:
            return self._pixels(files[0])
        if len(files) > 1:
            return torch.stack([self._pixels(file) for file in files], 1)
        with Image.open(files[0]) as opened:
            return torch.stack([self._picture(frame.copy()) for frame in ImageSequence.Iterator(opened)], 1)

    def _pixels(self, file: Path) -> Tensor:
        with Image.open(file) as opened:
            return self._picture(ImageOps.exif_transpose(opened))

    def _picture(self, image: Image.Image) -> Tensor:
        image = converted(image, self.channels)
        if self.side is not None:
            side = min(image.size)
            if side < self.side:
                raise ValueError(f"{image.width}x{image.height}, none is scaled up to {self.side}")
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box)
        values = torch.from_numpy(np.array(image))
        return values.view(image.height, image.width, self.channels).permute(2, 0, 1)

    def _check(self, whole: Sequence[_Item], number: int) -> None:
        """Refuse too many damaged files, and samples of different sizes."""
        if len(self.damaged) > self.corrupt_share * number:
            shown = "; ".join(self.damaged[:3]) + ("; ..." if len(self.damaged) > 3 else "")
            fix = (
                f"Mend or remove them, or set corrupt_share={len(self.damaged) / number:.3g} or more to leave them out."
            )
            constraint = f"must hold at most {self.corrupt_share:.3g} of damaged files"
            raise UserError(self.key, constraint, f"{len(self.damaged)} of {number}: {shown}", fix)
        sizes = Counter(item.shape for item in whole)
        if len(sizes) > 1:
            shown = ", ".join(f"{count} of {'x'.join(map(str, shape[1:]))}" for shape, count in sizes.most_common(4))
            fix = "Set size=N for the central square of each, scaled down to N, or sort them into folders."
            raise UserError(self.key, "must hold samples of one size", shown, fix)
        if self.limit is not None and self.limit > len(whole):
            fix = "Lower it, or leave it out for all."
            raise UserError("num_samples", f"must be at most the {len(whole)} in {self.path}", self.limit, fix)


@dataclass(frozen=True)
class _Item:
    """One sample of a folder."""

    files: tuple[Path, ...]
    sha256: str
    shape: tuple[int, ...]
    label: int | None
    caption: str


def _captions(root: Path, key: str) -> dict[str, str]:
    try:
        told = Folder(root, None)
        return {told.name(index): told.caption(index) for index in range(len(told))}
    except UserError as error:
        raise UserError(
            key, f"must hold captions for clip_score: {error.constraint}", error.value, error.fix
        ) from error


def _frames_of(file: Path) -> int:
    try:
        with Image.open(file) as opened:
            return int(getattr(opened, "n_frames", 1))
    except Exception:  # what is damaged is told when it is read
        return 1
