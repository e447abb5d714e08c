"""Which blocks of the attention matrix are computed: the layout that every mask, backend and converter speaks.

Index lists as flex_attention's BlockMask keeps them: for each block of queries the number of key blocks it reads and
their indices in ascending order. A batch or head dimension of size 1 stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffdistill.errors import UserError

BLOCKS = (64, 128)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A block mask as index lists. Immutable: do not write into its tensors either.

    block_q, block_k: rows and columns of a block, each 64 or 128.  q_len, kv_len: queries and keys, >= 1; the last
    block may be ragged.  kv_num: int32 [B|1, H|1, nQ], key blocks per query block.  kv_idx: int32 [B|1, H|1, nQ, max],
    their indices, strictly ascending; entries beyond kv_num are ignored but lie in [0, nK).  kv_valid: int32 [nK],
    of each key block only so many keys from its first on exist; None: all.  H counts query heads.

    Raises UserError naming the argument that breaks one of these.
    """

    block_q: int
    block_k: int
    q_len: int
    kv_len: int
    kv_num: Tensor
    kv_idx: Tensor
    kv_valid: Tensor | None = None

    def __post_init__(self) -> None:
        check_sizes(self.block_q, self.block_k, self.q_len, self.kv_len)
        self._check_shapes()
        self._check_lists()
        self._check_valid()
        for name in ("kv_num", "kv_idx", "kv_valid"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.contiguous())

    # -- makers -----------------------------------------------------------------------------------------------

    @classmethod
    def full(
        cls,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_k: int = 128,
        kv_valid: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Every block on, for every batch and head: dense attention."""
        check_sizes(block_q, block_k, q_len, kv_len)
        shape = (1, 1, count(q_len, block_q), count(kv_len, block_k))
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        return cls.from_mask(mask, q_len, kv_len, block_q, block_k, kv_valid)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_k: int = 128,
        kv_valid: Tensor | None = None,
    ) -> BlockLayout:
        """From bool [nQ, nK], [H|1, nQ, nK] or [B|1, H|1, nQ, nK], True where a block is computed."""
        check_sizes(block_q, block_k, q_len, kv_len)
        want = (count(q_len, block_q), count(kv_len, block_k))
        if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4 or tuple(mask.shape[-2:]) != want:
            constraint = (
                f"must be bool [.., {want[0]}, {want[1]}] for {q_len} queries and {kv_len} keys in these blocks"
            )
            raise UserError("mask", constraint, described(mask), "Give one entry per block.")
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        found = cls.trusted(block_q, block_k, q_len, kv_len, *lists(mask), kv_valid)
        found._check_valid()
        if kv_valid is not None:
            object.__setattr__(found, "kv_valid", kv_valid.contiguous())
        return found

    @classmethod
    def trusted(
        cls,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        kv_num: Tensor,
        kv_idx: Tensor,
        kv_valid: Tensor | None = None,
    ) -> BlockLayout:
        """From lists that are right by construction: nothing is checked, so nothing waits for a GPU."""
        found = object.__new__(cls)
        fields = (block_q, block_k, q_len, kv_len, kv_num, kv_idx, kv_valid)
        for name, value in zip(cls.__dataclass_fields__, fields, strict=True):
            object.__setattr__(found, name, value)
        return found

    # -- views ------------------------------------------------------------------------------------------------

    @property
    def num_q(self) -> int:
        """nQ, blocks of queries."""
        return count(self.q_len, self.block_q)

    @property
    def num_k(self) -> int:
        """nK, blocks of keys."""
        return count(self.kv_len, self.block_k)

    @property
    def device(self) -> torch.device:
        return self.kv_num.device

    @property
    def density(self) -> float:
        """Share of the blocks that are computed, in [0, 1]."""
        return float(self.kv_num.sum(dtype=torch.int64)) / (self.kv_num.numel() * self.num_k)

    def to_mask(self) -> Tensor:
        """bool [B|1, H|1, nQ, nK]; inverse of `from_mask`."""
        return dense(self.kv_num, self.kv_idx, self.num_k)

    def token_mask(self) -> Tensor:
        """bool [B|1, H|1, q_len, kv_len], True where a query reads a key."""
        mask = self.to_mask().repeat_interleave(self.block_q, -2)[..., : self.q_len, :]
        return mask.repeat_interleave(self.block_k, -1)[..., : self.kv_len] & self.valid_keys()

    def valid_keys(self) -> Tensor:
        """bool [kv_len], False for the keys beyond kv_valid of their block."""
        keys = torch.arange(self.kv_len, device=self.device)
        if self.kv_valid is None:
            return torch.ones_like(keys, dtype=torch.bool)
        return keys % self.block_k < self.kv_valid[keys // self.block_k]

    def transposed(self) -> tuple[Tensor, Tensor]:
        """q_num int32 [B|1, H|1, nK], q_idx int32 [B|1, H|1, nK, max]: the query blocks that read each key block.

        Computed once.
        """
        return self._transposed

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        return lists(self.to_mask().transpose(-1, -2))

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its tensors on `device`."""
        valid = None if self.kv_valid is None else self.kv_valid.to(device)
        return replace(self, kv_num=self.kv_num.to(device), kv_idx=self.kv_idx.to(device), kv_valid=valid)

    def with_blocks(self, block_q: int, block_k: int) -> BlockLayout:
        """The same mask in blocks of another size: exact in smaller ones, in larger ones a block is on if any part is.

        Larger key blocks with kv_valid only where the keys that exist stay the first ones of their block.
        """
        check_sizes(block_q, block_k, self.q_len, self.kv_len)
        mask = _rescaled(self.to_mask(), -2, self.block_q, block_q, count(self.q_len, block_q))
        mask = _rescaled(mask, -1, self.block_k, block_k, count(self.kv_len, block_k))
        valid = None if self.kv_valid is None else self._valid_in(block_k)
        return BlockLayout.from_mask(mask, self.q_len, self.kv_len, block_q, block_k, valid)

    def _valid_in(self, block_k: int) -> Tensor:
        """kv_valid for key blocks of another size."""
        keys = torch.nn.functional.pad(self.valid_keys(), (0, -self.kv_len % block_k)).view(-1, block_k)
        valid = keys.sum(-1, dtype=torch.int32)
        first = torch.arange(block_k, device=self.device) < valid[:, None]
        if not torch.equal(first, keys):
            constraint = f"must allow larger blocks: valid keys first in each block of {block_k}"
            raise UserError("block_k", constraint, f"kv_valid {self.kv_valid}", f"Keep {self.block_k}.")
        return valid

    # -- checks -----------------------------------------------------------------------------------------------

    def _check_shapes(self) -> None:
        for name, value, ndim in (("kv_num", self.kv_num, 3), ("kv_idx", self.kv_idx, 4)):
            if not isinstance(value, Tensor) or value.dtype != torch.int32 or value.ndim != ndim:
                constraint = f"must be an int32 tensor of {ndim} dimensions"
                raise UserError(name, constraint, described(value), "Convert it with .to(torch.int32).")
            self._check_device(name, value)
        if self.kv_num.shape[2] != self.num_q or 0 in self.kv_num.shape:
            constraint = f"must be [B, H, {self.num_q}]: {self.q_len} queries in blocks of {self.block_q}"
            raise UserError("kv_num", constraint, list(self.kv_num.shape), "Mend q_len, block_q or the lists.")
        if self.kv_idx.shape[:3] != self.kv_num.shape or self.kv_idx.shape[3] < 1:
            constraint = f"must be [{', '.join(map(str, self.kv_num.shape))}, max >= 1] like kv_num"
            raise UserError("kv_idx", constraint, list(self.kv_idx.shape), "Give one list for each count.")

    def _check_device(self, name: str, value: Tensor) -> None:
        if value.device != self.kv_num.device:
            raise UserError(name, f"must lie on {self.kv_num.device} like kv_num", value.device, "Move it.")

    def _check_lists(self) -> None:
        width = self.kv_idx.shape[3]
        if int(self.kv_num.min()) < 0 or int(self.kv_num.max()) > width:
            found = f"{int(self.kv_num.min())} to {int(self.kv_num.max())}"
            raise UserError("kv_num", f"must lie in [0, {width}], the length of the lists", found, "Mend the counts.")
        if int(self.kv_idx.min()) < 0 or int(self.kv_idx.max()) >= self.num_k:
            found = f"{int(self.kv_idx.min())} to {int(self.kv_idx.max())}"
            fix = (
                "Fill the entries beyond kv_num with 0." if int(self.kv_idx.min()) < 0 else "Mend the lists or kv_len."
            )
            raise UserError("kv_idx", f"must lie in [0, {self.num_k})", found, fix)
        listed = torch.arange(1, width, device=self.device) < self.kv_num[..., None]
        steps = self.kv_idx[..., 1:] - self.kv_idx[..., :-1]
        if bool((listed & (steps <= 0)).any()):
            what = "a duplicate" if bool((listed & (steps == 0)).any()) else "unsorted indices"
            raise UserError("kv_idx", "must ascend strictly in the first kv_num entries", what, "Sort each list once.")

    def _check_valid(self) -> None:
        valid = self.kv_valid
        if valid is None:
            return
        if not isinstance(valid, Tensor) or valid.dtype != torch.int32 or valid.ndim != 1:
            constraint = "must be an int32 tensor of 1 dimensions"
            raise UserError("kv_valid", constraint, described(valid), "Convert it with .to(torch.int32).")
        self._check_device("kv_valid", valid)
        if valid.shape != (self.num_k,):
            constraint = f"must be [{self.num_k}]: {self.kv_len} keys in blocks of {self.block_k}"
            raise UserError("kv_valid", constraint, list(valid.shape), "Give one count per key block.")
        starts = torch.arange(self.num_k, device=self.device) * self.block_k
        most = (self.kv_len - starts).clamp(max=self.block_k)
        if bool(((valid < 0) | (valid > most)).any()):
            constraint = f"must lie in [0, {self.block_k}] and within kv_len = {self.kv_len} in the last block"
            raise UserError("kv_valid", constraint, valid.tolist(), "Count the keys that exist.")


def check_sizes(block_q: int, block_k: int, q_len: int, kv_len: int) -> None:
    """Refuse blocks and lengths that no layout has."""
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        if value not in BLOCKS:
            raise UserError(name, f"must be one of {', '.join(map(str, BLOCKS))}", value, "128 suits most masks.")
    for name, value in (("q_len", q_len), ("kv_len", kv_len)):
        if not isinstance(value, int) or value < 1:
            raise UserError(name, "must be an integer >= 1", value, "Count the tokens.")


def count(length: int, block: int) -> int:
    """Blocks that hold `length` tokens."""
    return -(-length // block)


def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 [..] and ascending indices int32 [.., max >= 1] of the True entries of bool [.., n].

    Entries beyond the counts are in range. On a GPU lists are n long: their length would have to be waited for.
    """
    mask = mask.contiguous()  # what comes of it would have its strides
    num = mask.sum(-1, dtype=torch.int32)
    if mask.is_cuda:
        return num, (~mask).to(torch.uint8).argsort(stable=True, dim=-1).to(torch.int32)
    width = max(1, int(num.max()))
    at = mask.nonzero()  # row by row, ascending within one
    rank = (mask.cumsum(-1, dtype=torch.int32) - 1)[mask]
    idx = mask.new_zeros((*mask.shape[:-1], width), dtype=torch.int32)
    places = (*at[:, :-1].unbind(-1), rank.long())
    idx[places] = at[:, -1].to(torch.int32)
    return num, idx


def dense(num: Tensor, idx: Tensor, width: int) -> Tensor:
    """bool [.., width], True at the first num [..] entries of idx [.., max]; inverse of `lists`."""
    listed = torch.arange(idx.shape[-1], device=idx.device) < num[..., None]
    found = torch.zeros((*num.shape, width), dtype=torch.int32, device=idx.device)
    return found.scatter_add(-1, idx.long(), listed.to(torch.int32)) > 0


def described(value: object) -> str:
    """A value in an error: dtype and shape of a tensor."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _rescaled(mask: Tensor, dim: int, old: int, new: int, size: int) -> Tensor:
    """The mask with blocks of `new` tokens in place of `old` along `dim`, `size` of them."""
    if new < old:
        return mask.repeat_interleave(old // new, dim).narrow(dim, 0, size)
    if new == old:
        return mask
    ratio = new // old
    missing = size * ratio - mask.shape[dim]
    padding = [0, missing] if dim == -1 else [0, 0, 0, missing]
    padded = torch.nn.functional.pad(mask, padding)
    return padded.unflatten(dim, (size, ratio)).any(dim if dim == -1 else -2)
