"""What a clip of one moving digit shows: where the digit is in each frame, what it is, how fast it goes.

A digit is a bright patch of known size on black. Its place is where a window of that size holds most light; its motion
is that of the centre of light, which a rigid patch shifts by exactly what it moves.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Classifier

SCAN = 8  # side of what the feature network takes, pixels
FAINT = 0.1  # share of full brightness below which a pixel counts as background


class Motion(Protocol):
    """The law that clips were made by."""

    @property
    def side(self) -> int:
        """Of what moves, pixels: a multiple of 8."""
        ...

    def places(self, start: Tensor, labels: Tensor) -> Tensor:
        """Corners [B, T, 2] (row, column) of clips that begin at `start` [B, 2]."""
        ...

    def shown(self, labels: Tensor) -> Tensor:
        """The digit of each label, [B]."""
        ...


def light(clips: Tensor) -> Tensor:
    """Brightness in [0, 1] without faint pixels, [B, T, H, W], of clips [B, 1, T, H, W] in [-1, 1]."""
    bright = (clips[:, 0].clamp(-1, 1) + 1) / 2
    return torch.where(bright > FAINT, bright, 0)


def corners(clips: Tensor, side: int) -> Tensor:
    """Top left corners [B, T, 2] (row, column) of the side x side windows with most light; the middle of equals."""
    shone = light(clips)
    B, T = shone.shape[:2]
    sums = F.avg_pool2d(shone.flatten(0, 1)[:, None], side, stride=1)[:, 0]
    best = (sums >= sums.amax((1, 2), keepdim=True) * (1 - 1e-4) - 1e-6).to(sums.dtype)
    count = best.sum((1, 2))
    axes = [torch.arange(n, dtype=sums.dtype, device=sums.device) for n in sums.shape[1:]]
    row = (best.sum(2) * axes[0]).sum(1) / count
    column = (best.sum(1) * axes[1]).sum(1) / count
    return torch.stack((row, column), 1).floor().long().view(B, T, 2)


def centres(clips: Tensor) -> Tensor:
    """Centres of light [B, T, 2] (row, column), pixels; the middle of the frame where there is none."""
    shone = light(clips)
    total = shone.sum((2, 3))
    found = []
    for dim, size in ((3, clips.shape[3]), (2, clips.shape[4])):
        axis = torch.arange(size, dtype=shone.dtype, device=shone.device)
        moment = (shone.sum(dim) * axis).sum(2)
        found.append(torch.where(total > 0, moment / total.clamp(min=1e-6), (size - 1) / 2))
    return torch.stack(found, 2)


def windows(clips: Tensor, side: int) -> Tensor:
    """The side x side pixels around the digit of every frame, averaged down to [B * T, 1, 8, 8]."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    patches = frames[:, 0].unfold(1, side, 1).unfold(2, side, 1)
    row, column = corners(clips, side).flatten(0, 1).unbind(1)
    found = patches[torch.arange(len(frames), device=clips.device), row, column][:, None]
    return F.avg_pool2d(found, side // SCAN)


def velocity_errors(clips: Tensor, labels: Tensor, motion: Motion) -> Tensor:
    """Per clip [B]: mean distance, in pixels per frame, of the digit's velocity from the one its label and first place
    ask for."""
    asked = motion.places(corners(clips, motion.side)[:, 0], labels).diff(dim=1)
    return (centres(clips).diff(dim=1) - asked).norm(dim=2).double().mean(1)


@torch.no_grad()
def shown_agreements(clips: Tensor, labels: Tensor, motion: Motion, features: Classifier) -> Tensor:
    """Per clip [B]: 1 where its frames, taken together, show the digit it was asked for."""
    scores = features.logits(windows(clips, motion.side)).log_softmax(1).view(len(clips), -1, 10).mean(1)
    return (scores.argmax(1) == motion.shown(labels)).double()


def small_frames(clips: Tensor) -> Tensor:
    """All frames averaged down to about 16 pixels a side, [B * T, h, w]: what `frame_fd_pixel` compares."""
    return F.avg_pool2d(clips.clamp(-1, 1).transpose(1, 2).flatten(0, 1), max(1, clips.shape[-1] // 16))[:, 0]
