"""diffusers models as networks: UNet2DModel with the process of its CMStochasticIterativeScheduler."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config_check import check_keywords
from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.networks.files import quiet_libraries, refuse_unsafe, resolve, seeded
from diffdistill.networks.tamed import tame_time
from diffdistill.process import EDM, BoundaryF


class UNet2D(nn.Module):
    """A diffusers UNet2DModel that predicts BoundaryF under the EDM process.

    sigma_data, sigma_min, sigma_max: of the scheduler.  A model with num_class_embeds reads cond["label"] [B]; with
    `has_null` its last row is the null condition (label dropout).
    """

    closed_form = False
    embedding_name = "unet.time_embedding"

    def __init__(self, unet: Any, sigma_data: float, sigma_min: float, sigma_max: float, has_null: bool) -> None:
        super().__init__()
        self.unet = unet
        self.process = EDM.between(sigma_min, sigma_max)
        self.kind = BoundaryF(sigma_data, sigma_min)
        self.embedding_width = unet.time_embedding.linear_1.out_features
        self.num_classes = int(unet.config.num_class_embeds or 0)
        if has_null and not self.num_classes:
            raise UserError("has_null", "must be false for a network without classes", has_null, "Set it to false.")
        self.null: Cond | None = {"label": torch.tensor([self.num_classes - 1])} if has_null else None

    @property
    def backbone(self) -> Any:
        """The stock module, by whose names adapters find their places."""
        return self.unet

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Down blocks, the middle block, up blocks: the bottleneck is the one in the middle."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def check(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Raise UserError unless it denoises samples of `shape` with labels 0 to num_classes - 1.

        Fully convolutional, it would run at other sizes, but a pipeline draws at the size of its config.
        """
        config = self.unet.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        own = (config.in_channels, height, width)
        if own != tuple(shape) or config.out_channels != config.in_channels:
            raise UserError("networks", f"must denoise samples of the data's shape {list(shape)}",
                            f"a UNet for {list(own)}", "Change data or networks, or the data's size.")  # fmt: skip
        levels = len(config.down_block_types) - 1
        if height % 2**levels or width % 2**levels:
            constraint = f"need a size divisible by {2**levels}, for {levels} halvings"
            fix = "Choose another size, or a UNet with fewer levels."
            raise UserError("networks", constraint, f"{height}x{width}", fix)
        classes = self.num_classes - (self.null is not None)
        if classes != num_classes:
            null = "one more for the null condition" if self.null is not None else "none for a null condition"
            constraint = f"must have one class row per class of the data, {num_classes}, and {null}"
            fix = "Mend networks.has_null, or choose other networks."
            raise UserError("networks", constraint, f"{self.num_classes} rows", fix)

    def scale(self, t: Tensor) -> Tensor:
        return torch.rsqrt(t.square() + self.kind.sigma_data**2)

    def time(self, t: Tensor) -> Tensor:
        return 250 * torch.log(t)  # CMStochasticIterativeScheduler feeds 1000 * 0.25 * ln(sigma)

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        labels = cond["label"] if self.num_classes else None
        return self.unet(x, t_net, class_labels=labels, return_dict=False)[0]


def unet2d_from_config(
    config: Mapping[str, Any], sigma_data: float, sigma_min: float, sigma_max: float, tame: bool, seed: int
) -> UNet2D:
    """A UNet2DModel with random weights. config: its keyword arguments; num_class_embeds counts the null row."""
    from diffusers import UNet2DModel

    keywords = model_keywords(config, UNet2DModel, _COUNTS)
    with seeded(seed):
        try:
            unet = UNet2DModel(**keywords)
        except Exception as error:  # diffusers leaves most of its keywords unchecked
            raise UserError("config", "must build a diffusers UNet2DModel", repr(error), "Mend its keys.") from error
    return _network(unet, sigma_data, sigma_min, sigma_max, bool(unet.config.num_class_embeds), tame)


def unet2d(path: str, sigma_data: float, sigma_min: float, sigma_max: float, has_null: bool, tame: bool) -> UNet2D:
    """A pretrained UNet2DModel. path: a folder of `save_pretrained`, `asset:<name>` for a shipped one, or a hub id.

    sigma_data, sigma_min, sigma_max: of the CMStochasticIterativeScheduler it was trained with.  tame: hold the fast
    time columns at zero while training (they must be zero already).
    """
    from diffusers import UNet2DModel

    place = resolve(path)
    if not Path(place).is_dir() and not _HUB_ID.fullmatch(str(place)):
        raise UserError("path", "must be a folder, asset:NAME or a hub id OWNER/NAME", repr(path), "Name one.")
    if Path(place).is_dir():
        refuse_unsafe(Path(place))
    try:
        with quiet_libraries():
            if torch.get_default_device().type == "meta":  # dry run: shapes only
                unet = UNet2DModel.from_config(UNet2DModel.load_config(str(place)))
            else:
                unet = UNet2DModel.from_pretrained(str(place), use_safetensors=True)
    except Exception as error:  # whatever a folder or the hub may hold
        raise UserError("path", "must hold a diffusers UNet2DModel", repr(path), _first_line(error)) from error
    return _network(unet, sigma_data, sigma_min, sigma_max, has_null, tame)


# sizes of which none makes no network; diffusers would take some of them
_COUNTS = {
    "sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
    "num_class_embeds", "attention_head_dim",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _network(unet: Any, sigma_data: float, sigma_min: float, sigma_max: float, has_null: bool, tame: bool) -> UNet2D:
    if tame:
        tame_time(unet, fastest=1 / 250)
    return UNet2D(unet, sigma_data, sigma_min, sigma_max, has_null)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def model_keywords(config: Mapping[str, Any], cls: type, counts: Set[str]) -> dict[str, Any]:
    """`config` as plain keywords of a diffusers class, checked: all of them its own, those of `counts` >= 1 or None."""
    keywords = {key: _plain(value) for key, value in config.items()}
    check_keywords(keywords, cls, "config")
    for key in counts & keywords.keys():
        found = keywords[key] if isinstance(keywords[key], list) else [keywords[key]]
        if found != [None] and min(found, default=0) < 1:
            raise UserError(f"config.{key}", "must be >= 1", keywords[key], "Raise it.")
    return keywords


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
