"""Feature networks by name: clean-fid's Inception, and any image network of timm, transformers or open_clip."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.config_errors import first_line
from diffdistill.errors import UserError
from diffdistill.hashing import file_sha256
from diffdistill.networks.files import quiet_libraries

from .features import WholePictures
from .protocol import tensor_sha256

KINDS = ("inception", "timm", "transformers", "open_clip")
MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
INCEPTION = "inception-2015-12-05.pt"
AT_ONCE = 50  # pictures per call of a network: fixed, so that a picture's features do not hang on its neighbours
FORM = "KIND:NAME or KIND:NAME@WEIGHTS"


def load_space(spec: str, device: torch.device | str = "cpu", key: str = "features") -> WholePictures:
    """The feature network that `spec` names.

    inception, inception:MODE, inception:MODE@FILE: clean-fid's; MODE among clean (the default), legacy_pytorch and
    legacy_tensorflow.
    timm:NAME, timm:NAME@CHECKPOINT, timm:FOLDER: the pooled features.
    transformers:NAME-OR-FOLDER: image embedding, pooled output or class token, the first that the model has.
    open_clip:NAME@PRETRAINED: image embedding; PRETRAINED is a tag of open_clip's or a file.
    Weights come from the library's cache, or are downloaded by it. Raises UserError if they cannot be had.
    """
    kind, _, rest = spec.partition(":")
    name, _, weights = rest.partition("@")
    if kind not in KINDS or (kind != "inception" and not name):
        raise UserError(key, f"must be data, or {FORM} with KIND among {', '.join(KINDS)}", repr(spec),
                        "Write for example timm:resnet50 or inception:clean.")  # fmt: skip
    if kind == "inception":
        return load_inception(name or "clean", weights or None, device, key)
    require_library(kind, key)
    loaders: dict[str, Callable[[str, str], tuple[torch.nn.Module, Call, Call, str]]] = {
        "timm": _timm, "transformers": _transformers, "open_clip": _open_clip,
    }  # fmt: skip
    try:
        with quiet_libraries():
            model, prepare, call, resize = loaders[kind](name, weights)
    except Exception as error:  # each library has its own ways to say that there is no such network
        fix = f"{first_line(error)} Give a name that {kind} knows, or the path of a folder or file."
        raise UserError(key, f"must name a network that {kind} can load", repr(spec), fix) from error
    return Pictures(spec, model.to(device), prepare, call, resize)


Call = Callable[..., Any]


def require_library(kind: str, key: str) -> None:
    """Refuse a kind whose library is not installed."""
    if importlib.util.find_spec(kind) is None:
        package = {"open_clip": "open_clip_torch"}.get(kind, kind)
        raise UserError(key, f"needs the library {kind}", "it is not installed", f"pip install {package}")


def pictures_of(x: Tensor) -> list[np.ndarray]:
    """Images [B, C, H, W] in [-1, 1] as a pipeline writes them into files: uint8 [H, W, 3] each, grey in all three."""
    bytes_ = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    if bytes_.shape[1] == 1:
        bytes_ = bytes_.expand(-1, 3, -1, -1)
    return list(bytes_.permute(0, 2, 3, 1).contiguous().numpy())


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of all weights and buffers, in the order of their names."""
    return tensor_sha256(*(value for _, value in sorted(model.state_dict().items())))


class Pictures(WholePictures):
    """A network with its own preparation of pictures. prepare: PIL images -> its input.  call: input -> [B, dim]."""

    def __init__(self, name: str, model: torch.nn.Module, prepare: Call, call: Call, resize: str) -> None:
        self.name, self.resize = name, resize
        self._model = model.eval().requires_grad_(False)
        self._prepare, self._call = prepare, call
        self.sha256 = weights_sha256(model)
        self.dim = self.features(torch.zeros(1, 3, 64, 64)).shape[1]

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        device = next(self._model.parameters()).device
        found = []
        for block in x.split(AT_ONCE):
            inputs = self._prepare([Image.fromarray(picture) for picture in pictures_of(block)])
            found.append(self._call(inputs.to(device)).float().flatten(1).cpu())
        return torch.cat(found)


class CleanFid(WholePictures):
    """clean-fid's features: its resizing and its call of the network, on pictures quantised as files hold them.

    call: [B, 3, H, W] in 0..255 -> [B, dim].  mode: of clean-fid, which decides the resizing.
    Source: Parmar et al. 2022, arXiv:2104.11222.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], mode: str, sha256: str, device: torch.device | str) -> None:
        from cleanfid.resize import build_resizer

        self.name, self.sha256 = f"inception:{mode}", sha256
        self.resize = f"8 bits, {_RESIZING[mode]} (clean-fid {mode})"
        self._call, self._resizer, self._device = call, build_resizer(mode), device
        self.dim = self.features(torch.zeros(1, 3, 64, 64)).shape[1]

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_tensor

        found = []
        for block in x.split(AT_ONCE):
            resized = [self._resizer(picture) for picture in pictures_of(block)]
            # as clean-fid's loader does: 8 bits pass through [0, 1], what was resized does not
            inputs = [to_tensor(p) * 255 if p.dtype == np.uint8 else to_tensor(p) for p in resized]
            found.append(self._call(torch.stack(inputs).to(self._device)).float().cpu())
        return torch.cat(found)


_RESIZING = {
    "clean": "PIL bicubic to 299 x 299",
    "legacy_pytorch": "bilinear without antialiasing to 299 x 299",
    "legacy_tensorflow": "resized inside the network",
}


def load_inception(mode: str, weights: str | None, device: torch.device | str, key: str = "features") -> CleanFid:
    """Clean-fid's Inception in one of its modes. weights: the file, None is clean-fid's own cache or download."""
    if mode not in MODES:
        raise UserError(key, f"must be inception:MODE with MODE among {', '.join(MODES)}", mode, "Mend the name.")
    if mode == "legacy_pytorch":
        return _legacy_pytorch(weights, device, key)
    from cleanfid.inception_torchscript import InceptionV3W

    folder = Path("./" if platform.system() == "Windows" else "/tmp")  # where clean-fid keeps it
    file = folder / INCEPTION if weights is None else Path(weights).expanduser()
    if weights is not None and (not file.is_file() or file.name != INCEPTION):
        fix = f"Give the path of {INCEPTION}, which clean-fid downloads to {folder}."
        raise UserError(key, f"must end in @ and the path of {INCEPTION}", weights, fix)
    try:
        model = InceptionV3W(str(file.parent), download=weights is None, resize_inside=mode == "legacy_tensorflow")
    except Exception as error:  # without a network, or from a damaged file
        fix = f"{first_line(error)} Put {INCEPTION} into {folder}, or write inception:{mode}@PATH/{INCEPTION}."
        raise UserError(key, "needs the weights of clean-fid's Inception", str(file), fix) from error
    return CleanFid(model.to(device).eval(), mode, file_sha256(file), device)


def _legacy_pytorch(weights: str | None, device: torch.device | str, key: str) -> CleanFid:
    from cleanfid.inception_pytorch import InceptionV3

    if weights is not None:
        fix = f"Put it into {torch.hub.get_dir()}/checkpoints, where torch looks."
        raise UserError(key, "must name no file for inception:legacy_pytorch", weights, fix)
    try:
        model = InceptionV3(output_blocks=[3], resize_input=False).to(device).eval()
    except Exception as error:
        fix = f"{first_line(error)} Put pt_inception-2015-12-05-6726825d.pth into {torch.hub.get_dir()}/checkpoints."
        raise UserError(key, "needs the weights of pytorch-fid's Inception", "none", fix) from error

    def call(x: Tensor) -> Tensor:
        return model(x / 255)[0].flatten(1)

    return CleanFid(call, "legacy_pytorch", weights_sha256(model), device)


def _timm(name: str, weights: str) -> tuple[torch.nn.Module, Call, Call, str]:
    import timm

    known = f"local-dir:{name}" if Path(name).is_dir() else name
    how: dict[str, Any] = {"checkpoint_path": weights} if weights else {"pretrained": True}
    model = timm.create_model(known, num_classes=0, **how)
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([transform(picture) for picture in pictures])

    size, how_resized = settings["input_size"][1:], settings["interpolation"]
    return model, prepare, model, f"8 bits, {how_resized} to {size[0]} x {size[1]}, crop {settings['crop_pct']} (timm)"


def _transformers(name: str, weights: str) -> tuple[torch.nn.Module, Call, Call, str]:
    from transformers import AutoImageProcessor, AutoModel

    if weights:
        raise ValueError("transformers takes a name or a folder, without @.")
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        return processor(images=list(pictures), return_tensors="pt")["pixel_values"]

    return model, prepare, lambda x: image_embedding(model, x), f"8 bits, {type(processor).__name__} (transformers)"


def image_embedding(model: Any, pixels: Tensor) -> Tensor:
    """What a model of transformers says of pictures, [B, d]: image embedding, else pooled output, else class token."""
    if hasattr(model, "get_image_features"):
        return plain_embedding(model.get_image_features(pixel_values=pixels))
    made = model(pixel_values=pixels)
    pooled = getattr(made, "pooler_output", None)
    return made.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def plain_embedding(made: Any) -> Tensor:
    """The embedding itself: transformers 5 wraps it."""
    return made if isinstance(made, Tensor) else made.pooler_output


def _open_clip(name: str, weights: str) -> tuple[torch.nn.Module, Call, Call, str]:
    import open_clip

    if not weights:
        raise ValueError("open_clip needs @ and a tag of its pretrained weights, or a file.")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights)

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([transform(picture) for picture in pictures])

    size = model.visual.image_size
    return model, prepare, model.encode_image, f"8 bits, {size} pixels (open_clip)"
