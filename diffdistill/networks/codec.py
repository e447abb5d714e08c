"""Between what a teacher denoises and what people see: identity for pixels, a VAE for latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Codec:
    """encode: pixels in [-1, 1] -> what the process noises.  decode: back, differentiable."""

    encode: Callable[[Tensor], Tensor] = _same
    decode: Callable[[Tensor], Tensor] = _same


PIXELS = Codec()


def vae_codec(vae: Any) -> Codec:
    """A diffusers autoencoder with its scaling_factor and (SD3, Flux) shift_factor; encode takes the mean latent."""
    scaling = float(vae.config.scaling_factor)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def encode(x: Tensor) -> Tensor:
        return (vae.encode(x).latent_dist.mode() - shift) * scaling

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z / scaling + shift).sample

    return Codec(encode, decode)
