"""The fewest live bytes that a step can do with: what stays, and of its passes what each needs when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from diffdistill.bench_passes import Made
from diffdistill.memory import PeakBytes
from diffdistill.networks.roles import Networks


@dataclass(frozen=True)
class Bytes:
    """Of one pass, beyond what there was before it. forward: at its peak.  graph: what stays for the backward pass.
    backward: at the peak of that, beyond the graph, its gradients with it."""

    forward: int
    graph: int
    backward: int


def bytes_of(
    made: Made, stays: Sequence[Tensor], networks: Networks, autocast: Callable[[], AbstractContextManager[object]]
) -> Bytes:
    """Of a pass made again alone. stays: what is live all the time."""
    networks.train_only(made.phase.trains)
    counter = PeakBytes([*stays, *made.tensors()])
    with counter:
        before = counter.current
        with autocast():
            outputs = made.forward()
        forward, graph = counter.peak - before, counter.current - before
        backward = 0
        if made.reached:
            counter.peak = counter.current
            made.backward(outputs)
            backward = counter.peak - before - graph
    del outputs
    networks.zero_grad()
    return Bytes(forward, graph if made.reached else 0, backward)


def least_bytes(stays: Iterable[Tensor], passes: Sequence[Made], found: Sequence[Bytes], networks: Networks) -> int:
    """Of the largest phase: what stays, and the most that its passes need together.

    A pass needs the graphs of those before it, and its own; backward passes go from the last to the first, and leave
    the gradients of the weights they reach.
    """
    counted = PeakBytes(stays).current
    phases = [list(group) for _, group in groupby(zip(passes, found, strict=True), key=lambda pair: id(pair[0].phase))]
    return counted + max(_of_phase(phase, networks) for phase in phases)


def _of_phase(phase: Sequence[tuple[Made, Bytes]], networks: Networks) -> int:
    graphs = most = 0
    for _, need in phase:
        most = max(most, graphs + need.forward)
        graphs += need.graph
    done: set[str] = set()
    for made, need in reversed(phase):
        others = sum(_weight_bytes(networks, role) for role in done - {made.role})
        most = max(most, graphs + others + need.backward)
        graphs -= need.graph
        if need.backward and made.role in made.phase.trains:
            done.add(made.role)
    return max(most, sum(_weight_bytes(networks, role) for role in phase[0][0].phase.trains))


def _weight_bytes(networks: Networks, role: str) -> int:
    return sum(weight.nbytes for weight in networks.weights(role))
