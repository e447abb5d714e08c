"""The processes of a run: which one this is, what they tell each other, and how they fail together.

torchrun or accelerate launch start them; `parallel.Parallel.running` lets them meet. On one process everything here is
the identity. Every function but `place` and `is_main` is a collective: all processes call it, in the same order. What
is sent are a few numbers, or objects of this package, over gloo on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.shards import Gathered

T = TypeVar("T")


def place() -> tuple[int, int]:
    """(rank, number of processes) of this process."""
    dist: Any = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return place()[0] == 0


def highest(*values: float) -> list[float]:
    """The largest of each number over all processes."""
    return _reduced(values, "MAX") if place()[1] > 1 else list(values)


def mean(figures: Mapping[str, float]) -> dict[str, float]:
    """The mean of each figure over all processes, which have the same ones."""
    size = place()[1]
    if size == 1 or not figures:
        return dict(figures)
    return {key: total / size for key, total in zip(figures, _reduced(figures.values(), "SUM"), strict=True)}


def any_of(flag: bool) -> bool:
    """Whether it is true anywhere."""
    return bool(highest(float(flag))[0])


def main_says(value: T) -> T:
    """The main process's value."""
    if place()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_say(value: T) -> list[T]:
    """Everyone's value, by rank."""
    if place()[1] == 1:
        return [value]
    found: list[Any] = [None] * place()[1]
    torch.distributed.all_gather_object(found, value)
    return found


def together(work: Callable[[], T]) -> T:
    """Each does its own part; where one finds a mistake of the user, or no room to write, all raise that error.

    The first process that failed is heard. Whatever else goes wrong ends its process alone, and the others with it.
    """
    try:
        result, error = work(), None
    except (UserError, OSError) as caught:
        if place()[1] == 1:
            raise
        error = caught
    if any_of(error is not None):
        raise next(found for found in all_say(error) if found is not None)
    return result


def on_main(work: Callable[[], T], meanwhile: Gathered | None = None) -> T:
    """The main process does it and tells the others what came out; an error is everyone's.

    meanwhile: tensors that `work` goes through and the others help to gather.
    """
    if place()[1] == 1:
        return work()
    result: Any = None
    error: BaseException | None = None
    if is_main():
        try:
            result = work()
        except BaseException as caught:
            error = caught
    if meanwhile is not None:
        meanwhile.drain()
    try:
        told_error, told = main_says((_plain(error), result))
    except BaseException as lost:
        raise error or lost from None
    if error is not None:
        raise error
    if told_error is not None:
        raise told_error
    return told


def divided(blocks: Sequence[T], work: Callable[[T], Mapping[str, Tensor]]) -> list[dict[str, Tensor]] | None:
    """What `work` makes of each block, in order, the blocks shared out; the main process has it, others None.

    work: tensors [n, ...] of one block, by name, the same names and inner shapes for all. It may call sharded networks:
    all make as many calls, the last ones for nothing where blocks do not divide evenly.
    """
    rank, size = place()
    found: list[dict[str, Tensor]] = []
    for first in range(0, len(blocks), size):
        index = min(first + rank, len(blocks) - 1)
        made = {name: value.cpu() for name, value in work(blocks[index]).items()}
        everyone = [made] if size == 1 else _gathered(made)
        found += everyone[: len(blocks) - first]
    return found if rank == 0 else None


def _gathered(made: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Everyone's tensors by rank, on the main process; they may differ in their first size."""
    lengths = all_say(len(next(iter(made.values()))))
    everyone: list[dict[str, Tensor]] = [{} for _ in lengths]
    for name, value in made.items():
        sent = value.new_zeros(max(lengths), *value.shape[1:])
        sent[: len(value)] = value
        there = [torch.empty_like(sent) for _ in lengths] if is_main() else None
        torch.distributed.gather(sent, there, dst=0)
        for rank, full in enumerate(there or ()):
            everyone[rank][name] = full[: lengths[rank]]
    return everyone


def _reduced(values: Any, how: str) -> list[float]:
    numbers = torch.tensor(list(values), dtype=torch.float64)
    torch.distributed.all_reduce(numbers, getattr(torch.distributed.ReduceOp, how))
    return numbers.tolist()


def _plain(error: BaseException | None) -> BaseException | None:
    """The error as the others can be told it: our own whole, others by their text."""
    if error is None or isinstance(error, UserError | OSError):
        return error
    if type(error).__module__.startswith("diffdistill"):
        return error
    return RuntimeError(f"the main process failed: {type(error).__name__}: {error}")
