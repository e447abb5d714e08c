"""What masks share that follow the grid alone: their layout is made once."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention.layout import BLOCKS, BlockLayout, count
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.ordering import Grid, built_once


class StaticMask(Mask):
    """A mask that does not look at the tokens. Its layouts are cached per mask, grid and device.

    Text attends everything and everything attends text. Blocks without tokens are off.
    """

    @property
    @abstractmethod
    def block(self) -> int:
        """Tokens of a block, of queries and of keys: 64 or 128."""

    @abstractmethod
    def video_blocks(self, grid: Grid) -> Tensor:
        """bool [n, n] or [H, n, n] for the n blocks that the video's slots fill or begin to fill."""

    def layout(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLayout:
        return _on(self, grid, q.device)


@built_once
def _on(mask: StaticMask, grid: Grid, device: torch.device) -> BlockLayout:
    return _made(mask, grid).to(device)


@built_once
def _made(mask: StaticMask, grid: Grid) -> BlockLayout:
    """The layout, from the video's blocks and the text behind them."""
    order, video = mask.ordering(grid), mask.video_blocks(grid)
    blocks, valid = count(order.slots, mask.block), order.valid(mask.block)
    without_text = order.video // mask.block if grid.text else blocks
    on = torch.ones(*video.shape[:-2], blocks, blocks, dtype=torch.bool)
    on[..., :without_text, :without_text] = video[..., :without_text, :without_text]
    if valid is not None:
        on &= (valid > 0) & (valid > 0)[:, None]
    return BlockLayout.from_mask(on, order.slots, order.slots, mask.block, mask.block, valid)


def check_block(block: int) -> None:
    """Refuse a block that no layout has."""
    if block not in BLOCKS:
        raise UserError("block", f"must be one of {', '.join(map(str, BLOCKS))}", block, "128 is what GPUs like.")
