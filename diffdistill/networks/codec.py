"""Between what a teacher denoises and what people see: identity for pixels, a VAE for latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Codec:
    """encode: pixels in [-1, 1] -> what the process noises.  decode: back, differentiable."""

    encode: Callable[[Tensor], Tensor] = _same
    decode: Callable[[Tensor], Tensor] = _same


PIXELS = Codec()


def codec_of(vae: Any) -> Codec:
    """A diffusers autoencoder with its normalisation: mean and std of each channel, or one scale and shift.

    encode takes the mean latent; decode is differentiable. VAEs of clips take and give [B, C, frames, H, W]; a
    picture is one frame to them (Qwen-Image).
    """
    scale, shift = _normalisation(vae)
    clips = any(weight.ndim == 5 for weight in vae.parameters())

    def encode(x: Tensor) -> Tensor:
        found = vae.encode(x[:, :, None] if clips and x.ndim == 4 else x)
        z = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
        z = (z - shift(z)) * scale(z)
        return z[:, :, 0] if clips and x.ndim == 4 else z

    def decode(z: Tensor) -> Tensor:
        whole = z / scale(z) + shift(z)
        if clips and z.ndim == 4:
            return vae.decode(whole[:, :, None]).sample[:, :, 0]
        return vae.decode(whole).sample

    return Codec(encode, decode)


def _normalisation(vae: Any) -> tuple[Any, Any]:
    """What a latent is multiplied by after what was subtracted, each as a function of a tensor like it."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    buffers = dict(vae.named_buffers())  # where LTX keeps them
    mean, std = buffers.get("latents_mean", mean), buffers.get("latents_std", std)
    factor = float(config.get("scaling_factor") or 1.0)
    if mean is not None and std is not None:
        return lambda z: factor / _channels(std, z), lambda z: _channels(mean, z)
    offset = float(config.get("shift_factor") or 0.0)
    return lambda z: factor, lambda z: offset


def _channels(values: Any, like: Tensor) -> Tensor:
    """One number per channel, shaped to meet a latent."""
    given = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return given.view(1, -1, *[1] * (like.ndim - 2))
