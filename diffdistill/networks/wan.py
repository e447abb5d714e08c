"""diffusers' WanTransformer3DModel as a network: rectified flow, velocity prediction, prompts from a table.

A teacher is a folder as diffusers writes a WanPipeline, with the embeddings of the prompts it was trained on beside
the transformer, so that training needs no text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.networks.diffusers import model_keywords
from diffdistill.networks.files import quiet_libraries, refuse_unsafe, resolve, seeded
from diffdistill.process import VELOCITY, Kind, NoiseProcess, RectifiedFlow

PROMPTS = "prompts.safetensors"  # in a teacher's folder: embeddings [classes + 1, tokens, width], the null one last


class Wan(nn.Module):
    """A WanTransformer3DModel that predicts the velocity eps - x0 under rectified flow, fed 1000 t.

    prompts: float [classes + 1, tokens, width], the text encoder's answer to each class's prompt, the null one last;
    cond["label"] [B] chooses among them.
    """

    closed_form = False
    embedding_name = "transformer.condition_embedder.time_embedder"
    prompts: Tensor

    def __init__(self, transformer: Any, prompts: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.process: NoiseProcess = RectifiedFlow()
        self.kind: Kind = VELOCITY
        self.register_buffer("prompts", prompts)
        self.embedding_width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.num_classes = len(prompts)
        self.null: Cond | None = {"label": torch.tensor([len(prompts) - 1])}
        width = transformer.config.text_dim
        if prompts.ndim != 3 or prompts.shape[2] != width:
            raise UserError("prompts", f"must be [classes + 1, tokens, {width}]", list(prompts.shape), "Mend text_dim.")

    @property
    def backbone(self) -> Any:
        """The stock module, by whose names adapters find their places."""
        return self.transformer

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.blocks)

    def check(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Raise UserError unless it denoises clips of `shape` with labels 0 to num_classes - 1."""
        config = self.transformer.config
        if len(shape) != 4 or shape[0] != config.in_channels or config.out_channels != config.in_channels:
            wanted = f"must denoise samples of the data's shape {list(shape)}"
            found = f"a transformer of {config.in_channels} channels, frames and two sides"
            raise UserError("networks", wanted, found, "Change data or networks.")
        for axis, size, patch in zip(("frames", "height", "width"), shape[1:], config.patch_size, strict=True):
            if size % patch:
                constraint = f"must cut the data's {axis}, {size}, into whole patches"
                raise UserError("networks", constraint, f"patches of {patch}", "Change data's size, or networks.")
        if num_classes != len(self.prompts) - 1:
            constraint = f"must have a prompt for each of the data's {num_classes} classes, and the null one"
            raise UserError("networks", constraint, f"{len(self.prompts)} prompts", "Choose the data it was made for.")

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, t: Tensor) -> Tensor:
        return 1000 * t

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        text = self.prompts[cond["label"]].to(x.dtype)
        return self.transformer(x, t_net, text, return_dict=False)[0]


def wan(path: str) -> Wan:
    """A pretrained WanPipeline folder (`asset:NAME` for a shipped one) with prompts.safetensors beside its parts."""
    from diffusers import WanTransformer3DModel

    place = Path(resolve(path))
    if not (place / PROMPTS).is_file():
        constraint = f"must be a folder of a WanPipeline with {PROMPTS}"
        raise UserError("path", constraint, repr(path), "A run's pipeline folder is one.")
    refuse_unsafe(place)
    try:
        with quiet_libraries():
            if torch.get_default_device().type == "meta":  # dry run: shapes only
                config = WanTransformer3DModel.load_config(str(place), subfolder="transformer")
                transformer = WanTransformer3DModel.from_config(config)
            else:
                transformer = WanTransformer3DModel.from_pretrained(
                    str(place), subfolder="transformer", use_safetensors=True
                )
    except Exception as error:  # whatever a folder may hold
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError("path", "must hold a diffusers WanTransformer3DModel", repr(path), message) from error
    return Wan(transformer, load_file(place / PROMPTS)["prompts"])


def wan_from_config(config: Mapping[str, Any], prompts: str, seed: int) -> Wan:
    """A WanTransformer3DModel with random weights. config: its keyword arguments.

    prompts: the folder whose prompts.safetensors it is trained with.
    """
    from diffusers import WanTransformer3DModel

    keywords = model_keywords(config, WanTransformer3DModel, _COUNTS)
    if len(keywords.get("patch_size", (1, 2, 2))) != 3:
        raise UserError("config.patch_size", "must be [frames, height, width]", keywords["patch_size"], "Give three.")
    table = Path(resolve(prompts)) / PROMPTS
    if not table.is_file():
        raise UserError("prompts", f"must be a folder with {PROMPTS}", repr(prompts), "asset:moving_digits has one.")
    with seeded(seed):
        try:
            transformer = WanTransformer3DModel(**keywords)
        except Exception as error:  # diffusers leaves most of its keywords unchecked
            raise UserError("config", "must build a WanTransformer3DModel", repr(error), "Mend its keys.") from error
    return Wan(transformer, load_file(table)["prompts"])


# sizes of which none makes no network
_COUNTS = {
    "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
    "ffn_dim", "num_layers",
}  # fmt: skip
