"""Choosing blocks by their scores: what masks that follow the tokens share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels import ordering
from diffdistill.kernels.ordering import Grid, Ordering


def largest(scores: Tensor, counts: int | Tensor) -> Tensor:
    """bool like scores [.., n]: the `counts` largest of each row; among equal ones those that come first.

    counts: an integer, or int64 [..], in 1 to n. The same on every device and in every run: no sort has to be stable.
    """
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)  # what is broken is computed, and shows
    if isinstance(counts, int):
        counts = torch.full(scores.shape[:-1], counts, device=scores.device)
    last = scores.sort(-1, descending=True).values.gather(-1, counts[..., None] - 1)
    above, equal = scores > last, scores == last
    missing = counts - above.sum(-1)
    return above | (equal & (equal.cumsum(-1) <= missing[..., None]))


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T, [B, Hq, nQ, nK], between one token of each block; q: [B, Hq, nQ, D], k: [B, Hkv, nK, D]."""
    return scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def with_text(mask: Tensor, order: Ordering, grid: Grid, block_q: int, block_k: int) -> Tensor:
    """bool [.., nQ, nK] with the rows and columns of all blocks that hold text on: it comes last in every order."""
    if grid.text == 0:
        return mask
    mask = mask.clone()
    mask[..., order.video // block_q :, :] = True
    mask[..., order.video // block_k :] = True
    return mask


def along(curve: str, grid: Grid) -> Ordering:
    """The order of this name: gilbert, a space-filling curve, or raster, the model's own."""
    return ordering.gilbert(grid) if curve == "gilbert" else ordering.raster(grid)


def check_curve(curve: str) -> None:
    if curve not in ("gilbert", "raster"):
        raise UserError("order", "must be gilbert or raster", repr(curve), "Mend the name.")


def check_shares(**shares: float | None) -> None:
    """Refuse the first that is not in (0, 1]; None passes."""
    for name, share in shares.items():
        if share is not None and not 0 < share <= 1:
            raise UserError(name, "must lie in (0, 1]", share, "It is a share of the whole: 0.1 is a tenth.")
