"""Layouts to and from block CSR and flex_attention's BlockMask, without loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention.layout import BlockLayout, count, dense, described

if TYPE_CHECKING:  # importing it brings in the compiler
    from torch.nn.attention.flex_attention import BlockMask


def to_bcsr(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """indptr int32 [B|1, H|1, nQ + 1] and indices int32 [blocks on]: row i of head h reads indices[indptr[b, h, i] :
    indptr[b, h, i + 1]]. Heads follow each other in `indices`."""
    ends = layout.kv_num.flatten().cumsum(0, dtype=torch.int32).view(layout.kv_num.shape)
    starts = ends[..., :1] - layout.kv_num[..., :1]
    listed = torch.arange(layout.kv_idx.shape[-1], device=layout.device) < layout.kv_num[..., None]
    return torch.cat((starts, ends), -1), layout.kv_idx[listed]


def from_bcsr(
    indptr: Tensor,
    indices: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int = 128,
    block_k: int = 128,
    kv_valid: Tensor | None = None,
) -> BlockLayout:
    """Inverse of `to_bcsr`; indptr may be [nQ + 1] or [H, nQ + 1] too.

    Raises UserError for pointers that do not fit.
    """
    if not 1 <= indptr.ndim <= 3 or indices.ndim != 1 or indptr.shape[-1] < 2:
        found = f"{described(indptr)} and {described(indices)}"
        raise UserError("indptr", "must be [.., nQ + 1] with indices [blocks on]", found, "See to_bcsr.")
    indptr = indptr.reshape((1,) * (3 - indptr.ndim) + indptr.shape).long()
    num = indptr.diff(dim=-1)
    bounds = (int(indptr.min()), int(indptr.max()))
    if int(num.min()) < 0 or bounds[0] < 0 or bounds[1] > len(indices):
        raise UserError("indptr", f"must ascend from 0 to at most {len(indices)}", list(bounds), "Mend the pointers.")
    width = max(1, int(num.max()))
    rank = torch.arange(width, device=indptr.device)
    listed = rank < num[..., None]
    where = (indptr[..., :-1, None] + rank)[listed]
    idx = torch.zeros(listed.shape, dtype=torch.int32, device=indptr.device)
    idx[listed] = indices[where].to(torch.int32)
    return BlockLayout(block_q, block_k, q_len, kv_len, num.to(torch.int32), idx, kv_valid)


@dataclass(frozen=True, eq=False)
class ValidKeys:
    """The mask_mod of a BlockMask that keeps a layout's kv_valid."""

    kv_valid: Tensor
    block_k: int

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k % self.block_k < self.kv_valid[k // self.block_k]


def to_flex(layout: BlockLayout) -> BlockMask:
    """As partial blocks of a BlockMask. Compile flex_attention: called eagerly it ignores lists without a mask_mod and
    computes dense attention."""
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    missing = layout.num_k - layout.kv_idx.shape[-1]  # flex takes the lists' width for the number of key blocks
    kv_idx = torch.nn.functional.pad(layout.kv_idx, (0, missing))
    mod = noop_mask if layout.kv_valid is None else ValidKeys(layout.kv_valid, layout.block_k)
    return BlockMask.from_kv_blocks(
        layout.kv_num,
        kv_idx,
        BLOCK_SIZE=(layout.block_q, layout.block_k),
        mask_mod=mod,
        seq_lengths=(layout.q_len, layout.kv_len),
    )


def from_flex(block_mask: BlockMask) -> BlockLayout:
    """Partial and full blocks as one layout. Raises UserError where a mask_mod hides part of a block."""
    from torch.nn.attention.flex_attention import noop_mask

    q_len, kv_len = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    mod, kv_valid = block_mask.mask_mod, None
    if isinstance(mod, ValidKeys):
        kv_valid = mod.kv_valid
    elif mod not in (None, noop_mask) and bool(block_mask.kv_num_blocks.any()):
        fix = "Build it from lists, or give the tokens' part as key_bias."
        raise UserError("block_mask", "must mask whole blocks", f"partial blocks under {mod}", fix)
    width = count(kv_len, block_k)
    mask = dense(block_mask.kv_num_blocks, block_mask.kv_indices, width)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        mask = mask | dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, width)
    return BlockLayout.from_mask(mask, q_len, kv_len, block_q, block_k, kv_valid)
