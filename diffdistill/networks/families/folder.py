"""A diffusers pipeline, as a folder or on the hub: one of its models, and what its scheduler says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffdistill.config_errors import first_line
from diffdistill.errors import UserError
from diffdistill.networks.files import quiet_libraries, refuse_unsafe, resolve
from diffdistill.networks.scheduled import Schedule, schedule_of

if TYPE_CHECKING:
    from diffdistill.networks.families.stock import Stock

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# the config in configs/networks for a pipeline whose model is of this class
NETWORKS = {
    "UNet2DConditionModel": "sd15",
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "QwenImageTransformer2DModel": "qwen_image",
    "SanaTransformer2DModel": "sana",
    "DiTTransformer2DModel": "dit",
    "WanTransformer3DModel": "wan",
    "CogVideoXTransformer3DModel": "cogvideox",
    "LTXVideoTransformer3DModel": "ltx_video",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "StableAudioDiTModel": "stable_audio",
}
SCHEDULER = "scheduler/scheduler_config.json"


def load(path: str, family: type[Stock]) -> tuple[Any, Schedule]:
    """The family's model in the pipeline at `path` (a folder, or a hub id OWNER/NAME) and its schedule.

    On the meta device only shapes are read. Raises UserError naming the part that is missing, of another class or not
    to be reached.
    """
    import diffusers

    place = whole_folder(path, (f"{family.part}/*", SCHEDULER, "model_index.json"))
    config = _json(place / family.part / "config.json", path)
    found = config.get("_class_name")
    if found != family.model_class:
        fix = f"Use networks={NETWORKS[found]}." if found in NETWORKS else f"Known are: {', '.join(NETWORKS)}."
        raise UserError("path", f"must hold a {family.model_class} in {family.part}/", found, fix)
    schedule = schedule_of(_json(place / SCHEDULER, path))
    cls = getattr(diffusers, family.model_class)
    try:
        with quiet_libraries():
            if torch.get_default_device().type == "meta":  # dry run: shapes only
                model = cls.from_config(config)
            else:
                model = cls.from_pretrained(str(place / family.part), use_safetensors=True)
    except Exception as error:  # whatever a folder may hold
        raise UserError(
            "path", f"must hold a whole {family.model_class}", repr(path), first_line(error) or repr(error)
        ) from error
    return model, schedule


def family_of(path: str) -> str:
    """The config in configs/networks for the pipeline at `path` (a folder or hub id).

    Raises UserError listing the known ones if it has no model of a known family.
    """
    place = whole_folder(path, ("*/config.json", "model_index.json"))
    for part in ("unet", "transformer"):
        if (place / part / "config.json").is_file():
            config = _json(place / part / "config.json", path)
            found = str(config.get("_class_name"))
            if found == "UNet2DConditionModel" and config.get("addition_embed_type") == "text_time":
                return "sdxl"
            if found in NETWORKS:
                return NETWORKS[found]
            fix = (
                f"Known are: {', '.join(NETWORKS)}. A new one is a file in diffdistill/networks/families and one in "
                f"configs/networks."
            )
            raise UserError("model", "must be of a known family", found, fix)
    raise UserError("model", "must hold a unet or a transformer", repr(path), "Give a whole pipeline.")


def pipeline_class(path: str) -> Any:
    """The class of the pipeline at `path` (a folder or hub id), in diffusers."""
    import diffusers

    index = _json(whole_folder(path, ("model_index.json",)) / "model_index.json", path)
    return getattr(diffusers, index["_class_name"])


def load_schedule(path: str) -> Schedule:
    """The schedule of the pipeline at `path` (a folder or hub id)."""
    return schedule_of(_json(whole_folder(path, (SCHEDULER, "model_index.json")) / SCHEDULER, path))


def whole_folder(path: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a pipeline; of one on the hub, the files that match, from its cache where they are there."""
    place = Path(resolve(path))
    if place.is_dir():
        if not (place / "model_index.json").is_file():
            below = sorted(p.parent.name for p in place.glob("*/model_index.json"))
            fix = f"Did you mean {place / below[0]}?" if below else "Give the folder that save_pretrained wrote."
            raise UserError("path", "must be a pipeline folder, with model_index.json", repr(path), fix)
        refuse_unsafe(place)
        return place
    if not HUB_ID.fullmatch(path):
        raise UserError("path", "must be a pipeline folder or a hub id OWNER/NAME", repr(path), "Mend the path.")
    from huggingface_hub import snapshot_download

    try:
        place = Path(snapshot_download(path, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's errors, and those of every layer below it
        fix = f"Download it where there is a network (hf download {path} --local-dir DIR) and give path=DIR."
        raise UserError("path", "must be on the hub and reachable, or a folder", repr(path), fix) from error
    refuse_unsafe(place)
    return place


def _json(file: Path, path: str) -> dict[str, Any]:
    part = file.parent.name
    if not file.is_file():
        there = sorted(p.name for p in file.parents[1].iterdir() if p.is_dir())
        fix = f"It has {', '.join(there) or 'no part at all'}."
        raise UserError("path", f"must be a whole pipeline, {part}/{file.name} is missing", repr(path), fix)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("path", f"must hold a {part}/{file.name} that can be read", repr(path), str(error)) from error
    if not isinstance(found, dict):
        raise UserError("path", f"must hold a mapping in {part}/{file.name}", repr(path), "Save the pipeline again.")
    return found
