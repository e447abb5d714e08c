"""Images as tokens of 2 x 2 pixels, the layout in which Flux and Qwen-Image take their latents."""

from __future__ import annotations

from torch import Tensor

from diffdistill.networks.families.stock import TwoStreams


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4 C]."""
    B, C, H, W = x.shape
    return x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H/2 * W/2, 4 C] -> [B, C, H, W]."""
    B, _, channels = tokens.shape
    x = tokens.view(B, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, channels // 4, height, width)


class Packed(TwoStreams):
    """A transformer over packed latents."""

    @property
    def channels(self) -> int:
        return int(self.model.config.in_channels) // 4

    @property
    def reads_more(self) -> bool:
        return False

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[-2] * shape[-1] // 4

    def time(self, t: Tensor) -> Tensor:
        return t  # the model multiplies by 1000 itself

    def own_layout(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        return unpack(latents, *shape[-2:])
