"""Tensors of which each process holds a part, for code that does not care: this process's part, the whole, and a whole
placed as another tensor lies. A plain tensor is its own part and whole.

A sharded tensor is a DTensor; only `parallel` makes them. What is said to be done together is a collective: every
process has to call it, on the same tensors in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Files = Mapping[str, Mapping[str, Tensor]]  # file name -> tensors by name
SMALL = 8192  # entries of a tensor that `norm` copies beside others
LONGEST_ROW = 2**15  # entries that a sum in float32 is good for


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor; without importing them, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part(tensor: Tensor) -> Tensor:
    """What this process holds of it: the same storage, without a graph. It may be empty."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`part` of each; where no graph is being made, what is whole is given as it is."""
    module = sys.modules.get("torch.distributed.tensor")
    sharded, graph = module.DTensor if module is not None else (), torch.is_grad_enabled()

    def mine(tensor: Tensor) -> Tensor:
        if isinstance(tensor, sharded):
            return tensor.detach().to_local()
        return tensor.detach() if graph and tensor.requires_grad else tensor

    return [mine(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of it, without a graph; together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole `value` laid out as `like`, of its shape, is: each process takes its part, nothing is sent.

    What is sharded already, or has another shape or a plain model, stays as it is.
    """
    if not is_sharded(like) or is_sharded(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import Shard

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    mine = value.detach()
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            length = -(-value.shape[placement.dim] // mesh.size(dim))  # as torch.chunk cuts
            first = min(mesh.get_local_rank(dim) * length, value.shape[placement.dim])
            mine = mine.narrow(placement.dim, first, min(length, value.shape[placement.dim] - first))
    return _as(torch.empty_like(part(like), dtype=value.dtype).copy_(mine), like)


def mapped(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of the tensor, one that keeps its shape and may be taken of some rows alone."""
    return _as(function(part(tensor)), tensor) if is_sharded(tensor) else function(tensor)


def _as(local: Tensor, like: Any) -> Tensor:
    """The sharded tensor with this part here, of the shape and layout of `like`."""
    from torch.distributed.tensor import DTensor

    layout = (like.device_mesh, like.placements)
    return DTensor.from_local(local, *layout, run_check=False, shape=like.shape, stride=like.stride())


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, in their dtype; together.

    On a CPU rows of large float32 tensors, which no process cuts, are summed by torch's float32 kernel; everything else
    in float64: the same for any number of parts, up to a last bit that almost never shows, and right to 1e-7. In
    float64 alone it took a tenth of a step of 100 M weights. What is too large for float32, `norm_in_float64` can tell.
    """
    own = parts(tensors)
    if not own or own[0].device.type != "cpu":
        return _root(tensors, _squares(own))
    few, others = [], []  # entries and norms of rows, all short, of which one sum is made
    for tensor, mine in zip(tensors, own, strict=True):  # the whole's shape decides, for all processes alike
        size = tensor.numel()
        if size < SMALL:
            few.append(mine.flatten())
        elif tensor.ndim > 1 and tensor.dtype == torch.float32 and size <= LONGEST_ROW * tensor.shape[0]:
            matrix = mine if mine.ndim == 2 else _as_it_lies(mine).flatten(1)
            few.append(torch.linalg.vector_norm(matrix, dim=1))
        else:
            others.append(mine)
    squares = [torch.linalg.vector_norm(torch.cat(few), dtype=torch.float64).square()] if few else []
    return _root(tensors, [*squares, *_squares(others)])


def _as_it_lies(tensor: Tensor) -> Tensor:
    """Rows of a convolution's weights with channels innermost, in that order: flattened they would be copied."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor


def norm_in_float64(tensors: Sequence[Tensor]) -> Tensor:
    """As `norm`, slower, for any size of the entries; together."""
    return _root(tensors, _squares(parts(tensors)))


def _squares(tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:
        return []
    return [torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()]


def _root(tensors: Sequence[Tensor], squares: Sequence[Tensor]) -> Tensor:
    """The root of the sum of the squares of all processes, in the dtype of the first of `tensors`."""
    if not tensors:
        return torch.zeros(())
    first = tensors[0]
    total = sum(squares[1:], squares[0])
    if is_sharded(first):
        from torch.distributed.tensor import Shard

        for dim, placement in enumerate(first.placements):  # type: ignore[attr-defined]
            if isinstance(placement, Shard):
                torch.distributed.all_reduce(total, group=first.device_mesh.get_group(dim))  # type: ignore[attr-defined]
    return total.sqrt().to(first.dtype)


class Gathered:
    """The wholes of sharded files, on the CPU of the main process, one file at a time; together.

    A stand-in for the mapping that `checkpoint.commit` goes through, once. On other processes it yields nothing to
    keep. `drain` takes part in what is left, so that the others are not kept waiting by a failure here.
    """

    def __init__(self, files: Files, keep: bool) -> None:
        self._items, self._keep = iter(files.items()), keep

    def items(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and tensors of each file that is left."""
        for name, named in self._items:
            yield name, self._of(named)

    def drain(self) -> None:
        """Gather what is left for the sake of the others."""
        for _ in self.items():
            pass

    def _of(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in named.items():
            full = whole(tensor)
            if self._keep:
                found[name] = full.cpu() if is_sharded(tensor) else full
        return found
