"""A user's own images: a folder with one subfolder per class, or without classes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffdistill.data import Source, epoch_indices, uniform_classes
from diffdistill.denoiser import Cond
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError, refuse_url
from diffdistill.evaluation.reference import Reference
from diffdistill.rng import Rng

# torchvision's own, without importing it, which takes a second
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
Classes = Literal["subfolders", "none"]
Fit = Literal["none", "crop"]

HELD = 2**30  # bytes of pixels that are decoded at once and kept; a larger folder is read batch by batch
WHITE = (255, 255, 255, 255)
NAMED_CLASSES = 20  # a card names no more


@dataclass(frozen=True)
class ImageFolder:
    """Images of a folder in [-1, 1] (raw / 127.5 - 1), float32 [channels, size, size], in epochs as `data.Digits`.

    path: of the folder; ~ is the home.  classes: `subfolders`, each directly below is a class, labelled 0, 1, ... by
    sorted name (torchvision's convention) with its images at any depth; `none`, every image below path, no labels.
    size: in pixels.  fit: `none`, every image must be size x size; `crop`, the central square of the shorter side is
    scaled down to it (PIL's bicubic, antialiased), never up.
    channels: 3, or 1. Colour to grey is ITU-R 601 luma, grey to colour three equal channels. Palettes and CMYK go to
    colour as PIL does it, transparent pixels are laid on white, 16-bit grey is rounded to 8 bits, EXIF orientation is
    applied, of an animation the first frame counts.
    name, description, licence: for figures and model cards; a description of None counts images and classes.

    An image is a file with one of torchvision's image extensions; others, and names that begin with a dot, are passed
    over. All headers are read at once, and the pixels too while they take at most 1 GiB as bytes, which then stay in
    memory: a mistake shows before the first step. Pixels of a larger folder are read when drawn, and a damaged file
    is found then.
    Raises UserError naming the folder or the first file at fault.
    """

    path: str
    size: int
    channels: Literal[1, 3]
    fit: Fit
    classes: Classes
    name: str = "image_folder"
    description: str | None = None
    licence: str = "unknown"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError("data.size", "must be >= 1 pixel", self.size, "Write for example data.size=32.")
        _check_sizes(self._files, self.size, self.fit)
        if len(self._files) * self.channels * self.size**2 <= HELD:
            self._pixels  # noqa: B018 - decoded here, before any work

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """In the order of their labels; empty without classes."""
        return tuple(folder.name for folder in class_folders(self.path, self.classes))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.size, self.size)

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"x0"})

    @property
    def from_files(self) -> bool:
        """Whether images are decoded at each batch: those of a small folder are held."""
        return "_pixels" not in self.__dict__

    @property
    def source(self) -> Source:
        text = f"a folder of {len(self._files)} images"
        if 0 < self.num_classes <= NAMED_CLASSES:
            text += f", classes in order: {', '.join(self.class_names)}"
        elif self.num_classes:
            text += f", {self.num_classes} classes by sorted name"
        return Source(self.description or text, self.licence)

    @cached_property
    def _by_class(self) -> list[list[Path]]:
        """Files of each class; without classes, one list of all."""
        folders = class_folders(self.path, self.classes) or [_folder(self.path)]
        found = [images_below(folder) for folder in folders]
        for folder, files in zip(folders, found, strict=True):
            if not files:
                kind = "class folder" if self.classes == "subfolders" else "folder"
                endings = ", ".join(IMG_EXTENSIONS)
                fix = f"Put in files that end in {endings}, or remove it."
                raise UserError("data.path", f"must hold images in every {kind}", f"none in {folder}", fix)
        return found

    @cached_property
    def _files(self) -> list[Path]:
        return [file for files in self._by_class for file in files]

    @cached_property
    def _labels(self) -> Tensor:
        return torch.tensor([label for label, files in enumerate(self._by_class) for _ in files])

    @cached_property
    def _pixels(self) -> Tensor:
        """All pixels, uint8 [n, channels, size, size]."""
        pixels = torch.empty(len(self._files), *self.shape, dtype=torch.uint8)
        for index, file in enumerate(self._files):
            pixels[index] = read_image(file, self.size, self.channels, self.fit)
        return pixels

    def _images(self, indices: Sequence[int]) -> Tensor:
        """The images at indices, float32 [len(indices), channels, size, size] in [-1, 1]."""
        if "_pixels" in self.__dict__:
            raw = self._pixels[torch.as_tensor(indices)]
        else:
            raw = torch.stack([read_image(self._files[i], self.size, self.channels, self.fit) for i in indices])
        return raw.to(torch.float32).div(127.5).sub(1)

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        shape = (len(rng), *self.shape)
        if "x0" not in needs:
            return Batch(self.conditions(rng), shape)
        chosen = epoch_indices(rng, global_batch, len(self._files)).tolist()
        cond = {"label": self._labels[chosen].to(rng.device)} if self.num_classes else {}
        return Batch(cond, shape, self._images(chosen).to(rng.device, dtype))

    def conditions(self, rng: Rng) -> Cond:
        return uniform_classes(rng, self.num_classes)

    def reference(self) -> Reference:
        """The whole folder, float32: four bytes per value in memory while it is in use."""
        labels = self._labels if self.num_classes else None
        return Reference(self.name, self._images(range(len(self._files))), labels)

    def features(self) -> None:
        return None


def class_rows(path: str, classes: Classes) -> int | None:
    """Rows of a class embedding for the folder: one per class and the null condition; None without classes."""
    _folder(path, "path")  # an own key, when it is not the data's
    return len(class_folders(path, classes)) + 1 if classes == "subfolders" else None


def class_folders(path: str, classes: Classes) -> list[Path]:
    """The folders directly below path, sorted by name; none for classes=none.

    Raises UserError if path is no folder, has no folder below, or images beside them.
    """
    folder = _folder(path)
    if classes == "none":
        return []
    with _reading(folder):
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if entry not in folders and _is_image(entry.name)]
    flat = "data.classes=none (with distiller.null_share=0: without classes there is no condition to drop)"
    if not folders and not loose:
        fix = "Give a folder that holds one folder of images per class, or images for data.classes=none."
        raise UserError("data.path", "must hold images", f"none in {folder}", fix)
    if not folders:
        raise UserError("data.classes", "subfolders needs one folder per class", f"images alone in {folder}",
                        f"Set {flat}.")  # fmt: skip
    if loose:
        raise UserError("data.classes", "subfolders needs every image inside the folder of its class", loose[0],
                        f"Move it, or set {flat}.")  # fmt: skip
    return folders


def read_image(file: Path, size: int, channels: Literal[1, 3], fit: Fit) -> Tensor:
    """A file's pixels as `ImageFolder` says, uint8 [channels, size, size].  Raises UserError if it is damaged."""
    with _reading(file), Image.open(file) as opened:
        image = converted(ImageOps.exif_transpose(opened), channels)
        if fit == "crop":
            image = _cropped(image, size)
        values = np.array(image)
    if values.shape[:2] != (size, size):  # the file was replaced since its header was read
        raise UserError("data.path", f"must hold images of {size}x{size}", file, "Leave the folder alone in a run.")
    return torch.from_numpy(values).view(size, size, channels).permute(2, 0, 1)


def converted(image: Image.Image, channels: Literal[1, 3]) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older PIL: I for 16 bits
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; store 8 or 16 bits")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("L" if channels == 1 else "RGB")


def _cropped(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _check_sizes(files: Sequence[Path], size: int, fit: Fit) -> None:
    """Read every header; refuse sizes that fit does not allow."""
    sizes = []
    for file in files:
        with _reading(file):
            _check_regular(file)
            with Image.open(file) as image:
                sizes.append(image.size)
    for file, (width, height) in zip(files, sizes, strict=True):
        if fit == "none" and (width, height) != (size, size):
            fix = "Set data.fit=crop (the central square of the shorter side, scaled down to data.size)."
            if len(set(sizes)) == 1 and width == height:
                fix = f"All are so: set data.size={width}" + (", or data.fit=crop." if width > size else ".")
            raise UserError("data.fit", f"none needs every image to be {size}x{size}",
                            f"{file} of {width}x{height}", fix)  # fmt: skip
        if min(width, height) < size:
            raise UserError("data.size", "must not exceed the shorter side of any image: none is scaled up",
                            f"{size} and {file} of {width}x{height}",
                            f"Set data.size={min(map(min, sizes))} or less, or remove the small ones.")  # fmt: skip


def _check_regular(file: Path) -> None:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise OSError("not a regular file")
    if status.st_size == 0:
        raise OSError("the file is empty")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong within as a UserError that names the path."""
    try:
        yield
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        said = " ".join(str(error).split()) or type(error).__name__
        kind = "image" if path.suffix.lower() in IMG_EXTENSIONS else "folder"
        raise UserError(
            "data.path", "must hold what can be read", path, f"Mend or remove this {kind}: {said}."
        ) from error


def _folder(path: str, key: str = "data.path") -> Path:
    refuse_url(key, path)
    # os.path answers False and leaves ~nobody where pathlib raises
    folder = Path(os.path.expanduser(path))
    if not path or not os.path.isdir(folder):
        fix = "It is a file: give the folder it lies in." if os.path.isfile(folder) else "There is no such folder."
        raise UserError(key, "must be a folder of images", path or "nothing", fix)
    return folder


def images_below(folder: Path) -> list[Path]:
    """Every image at any depth, sorted, through links too."""

    def fail(error: OSError) -> None:
        raise error

    found, entered = [], set()
    with _reading(folder):
        for root, inner, names in os.walk(folder, onerror=fail, followlinks=True):
            entered.add(os.path.realpath(root))
            # a link back up would be followed for ever
            inner[:] = [name for name in inner if not name.startswith(".")
                        and os.path.realpath(os.path.join(root, name)) not in entered]  # fmt: skip
            found += [Path(root, name) for name in names if _is_image(name) and not name.startswith(".")]
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)
