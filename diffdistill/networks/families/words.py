"""Prompts as a pipeline's own text encoders embed them; the encoders leave memory afterwards."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.config_errors import first_line
from diffdistill.errors import UserError
from diffdistill.networks.families.folder import SCHEDULER, whole_folder
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.files import quiet_libraries

KEPT = ("tokenizer", "text_encoder", "projection_model")
FILES = ("tokenizer*/*", "text_encoder*/*", "projection_model/*", "vae/config.json", SCHEDULER, "model_index.json")


@torch.no_grad()
def embedded(
    path: str, family: Stock, texts: Sequence[str], negative: str | None, batch_size: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Conditions of the prompts [N, ...] and of no prompt [1, ...] (or of the negative one), float32 on the CPU."""
    pipeline = encoders(path).to(device)
    found = told(family, pipeline, texts, batch_size)
    null = kept(family.no_words(pipeline, negative))
    del pipeline
    gc.collect()
    return {key: found[key] for key in null}, null


@torch.no_grad()
def told(family: Stock, pipeline: Any, texts: Sequence[str], batch_size: int) -> dict[str, Tensor]:
    """Conditions of the prompts [N, ...] by the encoders in `pipeline`, float32 on the CPU."""
    blocks = range(0, len(texts), batch_size)
    found = [kept(family.words(pipeline, list(texts[first : first + batch_size]))) for first in blocks]
    return {key: torch.cat([one[key] for one in found]) for key in found[0]}


def kept(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: (value.float() if value.is_floating_point() else value).cpu() for key, value in cond.items()}


def encoders(path: str) -> Any:
    """The pipeline at `path` without what draws."""
    from diffusers import DiffusionPipeline

    place = whole_folder(path, FILES)
    index = json.loads((place / "model_index.json").read_text())
    parts = [name for name, value in index.items() if isinstance(value, list)]
    if not any(name.startswith("text_encoder") and index[name][0] is not None for name in parts):
        fix = "Save the whole pipeline, or give embeddings: data=latents."
        raise UserError("path", "must hold a text encoder, for prompts", repr(path), fix)
    left_out = {name: None for name in parts if not name.startswith((*KEPT, "scheduler"))}
    try:
        with quiet_libraries():
            pipeline = DiffusionPipeline.from_pretrained(str(place), use_safetensors=True, **left_out)
    except Exception as error:  # whatever a folder may hold
        raise UserError(
            "path", "must hold text encoders that load", repr(path), first_line(error) or repr(error)
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latent_factors(path: str) -> tuple[int, int]:
    """Pixels per latent and side, and frames per latent, of the pipeline's VAE; (1, 1) where it has none."""
    file = whole_folder(path, FILES) / "vae" / "config.json"
    if not file.is_file():
        return 1, 1
    return factors_of(json.loads(Path(file).read_text()))


def factors_of(config: dict[str, Any]) -> tuple[int, int]:
    """Of a VAE's config: diffusers' classes name them in four ways."""
    for space in ("spatial_compression_ratio", "scale_factor_spatial"):
        if space in config:
            return int(config[space]), int(config.get(space.replace("spatial", "temporal"), 1))
    if "encoder_block_out_channels" in config:  # AutoencoderDC
        return 2 ** (len(config["encoder_block_out_channels"]) - 1), 1
    blocks = len(config.get("block_out_channels", (0,)))
    ratio = config.get("temporal_compression_ratio", 1)
    if "temperal_downsample" in config:  # as Wan and Qwen-Image spell it
        return 2 ** len(config["temperal_downsample"]), 2 ** sum(config["temperal_downsample"])
    return 2 ** (blocks - 1), int(ratio)
