"""A pipeline's VAE as a codec: between pixels in [-1, 1] and latents as its model noises them."""

from __future__ import annotations

import hashlib

import torch

from diffdistill.config_errors import first_line
from diffdistill.errors import UserError
from diffdistill.hashing import file_sha256
from diffdistill.networks.codec import PIXELS, Codec, codec_of
from diffdistill.networks.families.folder import whole_folder
from diffdistill.networks.files import quiet_libraries

FILES = ("vae/*", "model_index.json")


def vae_sha256(path: str) -> str | None:
    """Of the weights of the VAE in the pipeline at `path`; None where it has none."""
    place = whole_folder(path, FILES) / "vae"
    files = sorted(place.glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else None


def load_codec(path: str, device: torch.device | str = "cpu") -> Codec:
    """The codec of the pipeline at `path` (a folder or hub id), frozen, float32; pixels where it has no VAE.

    Raises UserError where the VAE does not load.
    """
    import diffusers

    place = whole_folder(path, FILES) / "vae"
    if not (place / "config.json").is_file():
        return PIXELS
    try:
        name = diffusers.AutoencoderKL.load_config(str(place))["_class_name"]
        with quiet_libraries():
            vae = getattr(diffusers, name).from_pretrained(str(place), use_safetensors=True)
    except Exception as error:  # whatever a folder may hold
        raise UserError("path", "must hold a VAE that loads", repr(path), first_line(error) or repr(error)) from error
    return codec_of(vae.float().to(device).eval().requires_grad_(False))
