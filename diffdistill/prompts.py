"""Prompts from a file, for methods that need no data: conditions a pipeline's own encoders embed before training.

A text file holds one prompt per line, a JSONL file one mapping per line, a parquet or CSV file or a folder of the
`datasets` library a column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.config_errors import first_line
from diffdistill.data import Source
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError, require_at_least
from diffdistill.evaluation.features import Classifier
from diffdistill.evaluation.reference import Reference
from diffdistill.networks.codec import Codec
from diffdistill.rng import Rng

COLUMNS = ("prompt", "text", "caption")


def read_prompts(path: str, column: str | None) -> list[str]:
    """The prompts of a file, in its order; empty lines are left out.

    column: of a JSONL, CSV or parquet file or a folder of `datasets`; None is the first of prompt, text, caption that
    it has. Raises UserError if there is no prompt at all.
    """
    file = Path(path)
    if not file.exists():
        raise UserError("data.path", "must be a file of prompts", repr(path), "A text file has one per line.")
    if file.suffix in (".jsonl", ".json"):
        found = [row[_column(row, column, f"{path}:{number}")] for number, row in _json_lines(file)]
    elif file.is_dir() or file.suffix in (".csv", ".parquet"):
        found = _table(file, column)
    elif column is not None:
        fix = "There a line is a prompt."
        raise UserError("data.column", "must be null for a text file", repr(column), fix)
    else:
        found = _lines(file)
    if other := next((item for item in found if not isinstance(item, str)), None):
        raise UserError("data.path", "must hold texts", repr(other), "Name another data.column.")
    prompts = [text.strip() for text in found if text.strip()]
    if not prompts:
        raise UserError("data.path", "must hold a prompt", repr(path), "Write one per line.")
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("data.path", "must be UTF-8 text", repr(str(file)), str(error)) from error


def _json_lines(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and rows."""
    rows = []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError("data.path", "must hold JSON on every line", f"{file}:{number}", str(error)) from error
        if not isinstance(row, dict):
            fix = 'Write {"prompt": "..."}.'
            raise UserError("data.path", "must hold a mapping on every line", f"{file}:{number}", fix)
        rows.append((number, row))
    return rows


def _table(file: Path, column: str | None) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        fix = "pip install datasets, or write the prompts as text or JSONL."
        raise UserError("data.path", "needs the datasets library for this file", str(file), fix) from error
    try:
        if file.is_dir():
            table = datasets.load_from_disk(str(file))
        else:
            table = datasets.load_dataset(file.suffix[1:], data_files=str(file), split="train")
    except Exception as error:  # whatever a file may hold
        raise UserError("data.path", "must be a table", str(file), first_line(error) or repr(error)) from error
    if isinstance(table, dict):
        fix = f"Give the folder of one: {', '.join(table)}."
        raise UserError("data.path", "must be one split of a data set", str(file), fix)
    return list(table[_column(dict.fromkeys(table.column_names), column, str(file))])


def _column(row: Mapping[str, Any], column: str | None, where: str) -> str:
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in row:
            return name
    fix = f"Set data.column; there is {', '.join(row) or 'none'}."
    raise UserError("data.column", f"must be a column of {where}", column, fix)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file; `told` makes them conditions of a network.

    size: of a sample, [height, width] in pixels; None is what the model was made for.  frames: of a clip, for video.
    negative: what the null condition is told; None is what the pipeline tells without a negative prompt.  batch_size:
    prompts embedded at once.
    """

    path: str
    column: str | None = None
    size: tuple[int, int] | None = None
    frames: int = 81
    negative: str | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_at_least(1, frames=self.frames, batch_size=self.batch_size)
        if self.size is not None and min(self.size) < 1:
            raise UserError("data.size", "must be two numbers >= 1, height and width", list(self.size), "Mend it.")

    def told(self, network: Any, pipeline: str | None) -> ToldPrompts:
        """The data set that `network`, from the pipeline folder or hub id `pipeline`, is trained on.

        Raises UserError where the network takes no text, or the size does not fit.
        """
        from diffdistill.networks.families.stock import Stock
        from diffdistill.networks.families.words import embedded, latent_factors

        texts = read_prompts(self.path, self.column)
        if not isinstance(network, Stock) or "text" not in network.needs or pipeline is None:
            fix = "Use networks=sd15, sdxl, flux, wan, ... with networks.path."
            raise UserError("data", "prompts need a network that reads text", type(network).__name__, fix)
        shape, pixels = network.latents(self.size, self.frames, *latent_factors(pipeline))
        device = next(network.parameters()).device
        if device.type == "meta":  # a dry run: one prompt shows what the others do
            texts, device = texts[:1], torch.device("cpu")
        cond, null = embedded(pipeline, network, texts, self.negative, self.batch_size, device)
        size = network.sized(*pixels)
        cond |= {key: value.expand(len(texts), -1) for key, value in size.items()}
        source = Source(f"the prompts of {self.path}", "unknown")
        return ToldPrompts(tuple(texts), shape, cond, null | size, source, pipeline, device)

    def of_pipeline(self) -> ToldPrompts:
        """The prompts for a whole pipeline, which embeds them itself."""
        source = Source(f"the prompts of {self.path}", "unknown")
        return ToldPrompts(tuple(read_prompts(self.path, self.column)), (), {}, {}, source)


@dataclass(frozen=True, eq=False)
class ToldPrompts:
    """Embedded prompts, drawn uniformly; the number of a prompt is its class.

    cond: [N, ...] by name.  null: [1, ...].  pipeline: whose VAE shows what latents are, on `device`; None: samples
    are pictures.
    """

    texts: tuple[str, ...]
    shape: tuple[int, ...]
    cond: dict[str, Tensor]
    null: dict[str, Tensor]
    source: Source
    pipeline: str | None = None
    device: torch.device | str = "cpu"
    name: str = field(default="prompts", init=False)
    provides: frozenset[str] = field(default=frozenset(), init=False)

    @property
    def num_classes(self) -> int:
        return len(self.texts)

    @cached_property
    def codec(self) -> Codec | None:
        """Loaded when something is first looked at; None: nothing is to be decoded, or a VAE's result is sound."""
        from diffdistill.networks.families.pixels import load_codec

        return None if self.pipeline is None or len(self.shape) < 3 else load_codec(self.pipeline, self.device)

    def examples(self) -> tuple[list[str], dict[str, Tensor]]:
        """The first and the last prompt with their conditions."""
        ends = [0, len(self.texts) - 1]
        return [self.texts[i] for i in ends], {key: value[ends] for key, value in self.cond.items()}

    def of_classes(self, labels: Tensor) -> dict[str, Tensor]:
        """Conditions of the prompts with these numbers [B], on their device."""
        index = labels.cpu()
        return {key: value[index].to(labels.device) for key, value in self.cond.items()} | {"label": labels}

    def conditions(self, rng: Rng) -> dict[str, Tensor]:
        return self.of_classes(rng.integers(len(self.texts), (len(rng),)))

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        return Batch(self.conditions(rng), (len(rng), *self.shape))

    def reference(self) -> Reference:
        """There is none: what prompts should look like is not in them."""
        fix = "Set evaluation=none; evaluate the pipeline against images."
        raise UserError("evaluation", "must be none for prompts, which have no images to compare with", self.name, fix)

    def features(self) -> Classifier | None:
        return None
