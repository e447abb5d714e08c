"""Adaptive block-sparse attention, ASA, as BLADE trains it together with TDM (2508.10774).

Tokens lie along a Gilbert curve. `sampled` of every block's tokens score all pairs of blocks; each row of blocks keeps
its largest scores. A global branch of mean tokens sees the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention import api, pooling
from diffdistill.kernels.attention.layout import BLOCKS, BlockLayout, count, lists
from diffdistill.kernels.attention.masks import selection
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.attention.merge import merge
from diffdistill.kernels.ordering import Grid, Ordering, built_once


@dataclass(frozen=True)
class ASA(Mask):
    """density: share of key blocks in every row, (0, 1]; None: the released rule, as many as make up less than `tau` of
    the row's attention (the block that reaches it is left out), within [least, most] of all, 0.17 for Wan.

    sampled: tokens of each block that are scored, a power of two up to `block`, 64 or 128; the same places in every
    block, drawn for each head, for queries and for keys from `seed` alone: recomputation and every rank find the same
    mask.  pooling: probability, the mean share of attention of a pair of blocks, or peak, the release's rule (see
    pooling.block_scores).  force_text: blocks with text attend, and are attended by, all.

    global_run: tokens of a run, 15 for CogVideoX and 30 for Wan; every query also attends the mean key of each run of
    the ordered sequence, which counts as many times as the run has tokens. Tokens in blocks that are on count twice,
    as in the release. None: no such branch. It takes no key_bias.  detach_merge: no gradient through the shares of
    the two branches, as in the release; else it is exact.  order: gilbert | raster.

    Raises UserError naming the field that does not fit.
    """

    density: float | None = None
    tau: float = 0.95
    least: float = 0.05
    most: float = 0.10
    sampled: int = 32
    pooling: pooling.Pooling = "probability"
    block: int = 128
    global_run: int | None = None
    detach_merge: bool = False
    seed: int = 0
    force_text: bool = True
    order: Literal["gilbert", "raster"] = "gilbert"

    def __post_init__(self) -> None:
        selection.check_curve(self.order)
        selection.check_shares(density=self.density, tau=self.tau, least=self.least, most=self.most)
        if self.least > self.most:
            raise UserError("least", f"must be at most `most`, {self.most}", self.least, "Lower it.")
        if self.block not in BLOCKS:
            raise UserError("block", f"must be one of {', '.join(map(str, BLOCKS))}", self.block, "128 is ASA's.")
        if not 1 <= self.sampled <= self.block or self.sampled & (self.sampled - 1):
            raise UserError("sampled", f"must be a power of two up to {self.block}", self.sampled, "32 is ASA's.")
        if self.pooling not in ("probability", "peak"):
            raise UserError("pooling", "must be probability or peak", repr(self.pooling), "Mend the name.")
        if self.global_run is not None and self.global_run < 1:
            raise UserError("global_run", "must be >= 1, or None", self.global_run, "30 suits Wan.")

    def ordering(self, grid: Grid) -> Ordering:
        return selection.along(self.order, grid)

    def layout(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLayout:
        return BlockLayout.from_mask(self._chosen(q, k, grid, scale), q.shape[2], k.shape[2], self.block, self.block)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        scale: float | None = None,
        key_bias: Tensor | None = None,
        backend: api.Backend | None = None,
    ) -> Tensor:
        if self.global_run is None:
            return super().attend(q, k, v, grid, scale, key_bias, backend)
        if key_bias is not None:
            raise UserError("key_bias", "must be None with global_run: means have none", "a bias", "Leave one out.")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        branches = _merged if self.detach_merge else _joined
        with torch.no_grad():
            chosen = self._chosen(q, k, grid, scale)
        return branches(q, k, v, chosen, self.block, self.global_run, scale, backend)

    def _chosen(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> Tensor:
        """bool [B, Hq, nQ, nK], the blocks that are computed."""
        of_q, of_k = _offsets(self.seed, q.shape[1], self.block, self.sampled, q.device)
        sampled = (_sample(q, of_q, self.block), _sample(k, of_k[: k.shape[1]], self.block))
        scores = pooling.block_scores(*sampled, self.sampled, scale, self.pooling)
        kept = selection.largest(scores, self._counts(scores))
        if self.force_text:
            kept = selection.with_text(kept, self.ordering(grid), grid, self.block, self.block)
        return kept

    def _counts(self, scores: Tensor) -> int | Tensor:
        """Blocks of each row."""
        num = scores.shape[-1]
        if self.density is not None:
            return max(1, round(self.density * num))
        # a share of so many blocks may lie a rounding beside a whole number
        fewest = max(1, math.ceil(self.least * num - 1e-9))
        most = max(fewest, math.floor(self.most * num + 1e-9))
        mass = scores.sort(-1, descending=True).values.cumsum(-1)
        return (mass < self.tau).sum(-1).clamp(fewest, most)


@built_once
def _offsets(seed: int, heads: int, block: int, sampled: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places within a block for queries and for keys, int64 [H, sampled] each, ascending."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.rand(2, heads, block, generator=draw).argsort(-1)[..., :sampled].sort(-1).values.to(device)
    return places[0], places[1]


def _sample(x: Tensor, offsets: Tensor, block: int) -> Tensor:
    """Those tokens of each block, [B, H, n * sampled, D]; the last token stands for those after it."""
    starts = torch.arange(count(x.shape[2], block), device=x.device) * block
    places = (starts[:, None] + offsets[:, None]).clamp(max=x.shape[2] - 1).flatten(1)
    return x[:, torch.arange(x.shape[1], device=x.device)[:, None], places]


# -- the global branch ------------------------------------------------------------------------------------------


def _joined(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, run: int, scale: float, backend: api.Backend | None
) -> Tensor:
    """One softmax over the chosen blocks and the means of runs, whose logits rise by the log of their tokens."""
    length, counts = k.shape[2], pooling.block_counts(k.shape[2], run, k.device)
    filling = -length % block
    k, v = (torch.cat((F.pad(x, (0, 0, 0, filling)), _run_means(x, run)), 2) for x in (k, v))
    bias = torch.cat((counts.new_ones(length + filling), counts)).float().log()
    means = count(len(counts), block)  # blocks of them, on for every row
    valid = torch.cat([pooling.block_counts(n, block, k.device) for n in (length, len(counts))]).to(torch.int32)
    kept = lists(F.pad(chosen, (0, means), value=True))
    layout = BlockLayout.trusted(block, block, q.shape[2], k.shape[2], *kept, valid)
    return api.block_sparse_attention(q, k, v, layout, scale, bias[None, None], backend=backend)


def _merged(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, run: int, scale: float, backend: api.Backend | None
) -> Tensor:
    """The same output in two calls, whose shares are constants."""
    layout = BlockLayout.from_mask(chosen, q.shape[2], k.shape[2], block, block)
    o, lse = api.block_sparse_attention(q, k, v, layout, scale, return_lse=True, backend=backend)
    counts = pooling.block_counts(k.shape[2], run, k.device)
    every = BlockLayout.full(q.shape[2], len(counts), block, block, device=q.device)
    means = (_run_means(k, run), _run_means(v, run))
    bias = counts.float().log()[None, None]
    o_g, lse_g = api.block_sparse_attention(q, *means, every, scale, bias, return_lse=True, backend=backend)
    return merge(o, lse.detach(), o_g, lse_g.detach())[0]


def _run_means(x: Tensor, run: int) -> Tensor:
    """Mean token of each run of [B, H, S, D], summed in float32 or better, in x's type."""
    wide, whole = torch.promote_types(x.dtype, torch.float32), x.shape[2] // run * run
    means = x[:, :, :whole].unflatten(2, (whole // run, run)).mean(3, dtype=wide)
    if whole < x.shape[2]:
        means = torch.cat((means, x[:, :, whole:].mean(2, keepdim=True, dtype=wide)), 2)
    return means.to(x.dtype)
