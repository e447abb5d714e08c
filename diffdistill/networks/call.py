"""The network call in progress: which role runs, at which time, with which extra inputs.

A view of a network enters one `Call`; LoRA linears, extra-input embedders and attention processors inside the network
read it, so that one shared backbone can be the teacher, the student and the fake score. Recomputation (activation
checkpointing) re-enters the call of the forward pass it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Call:
    """role: name of the role.  t: [B] time.  step, w, s: [B] extra inputs or None, s as the network's time map gives
    it.  seed: of dropout, or None."""

    role: str
    t: Tensor | None = None
    step: Tensor | None = None
    w: Tensor | None = None
    s: Tensor | None = None
    seed: int | None = None
    _above: dict[float, tuple[bool, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def above(self, bound: float) -> tuple[bool, ...]:
        """Of each sample whether its t, which must be there, lies above `bound`; waits for the device once per call."""
        if bound not in self._above:
            assert self.t is not None
            self._above[bound] = tuple((self.t.detach() > bound).tolist())
        return self._above[bound]


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call | None:
    """The call in progress, or None outside every network."""
    return _current.get()


@contextmanager
def enter(call: Call | None) -> Iterator[None]:
    """Make `call` the one in progress. With a seed, dropout inside is drawn from it and torch's generator restored."""
    token = _current.set(call)
    try:
        if call is not None and call.seed is not None:
            with torch.random.fork_rng():
                torch.manual_seed(call.seed)
                yield
        else:
            yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class Pass:
    """One network call of a training step. backward: its output has a graph; through_input: that graph reaches its
    input.  layers: blocks recorded by an early-stopped call, None for a whole one."""

    role: str
    batch: int
    backward: bool
    through_input: bool
    layers: tuple[int, ...] | None = None


_passes: ContextVar[list[Pass] | None] = ContextVar("passes", default=None)


@contextmanager
def recorded_passes() -> Iterator[list[Pass]]:
    """Within the context every network call is noted in the yielded list."""
    noted: list[Pass] = []
    token = _passes.set(noted)
    try:
        yield noted
    finally:
        _passes.reset(token)


def note_pass(done: Pass) -> None:
    """Add a finished network call to the recording in progress, if there is one."""
    noted = _passes.get()
    if noted is not None:
        noted.append(done)


@dataclass(frozen=True)
class Seen:
    """A whole network call with what went in and came out. network: process and kind of the prediction.

    x: [B, *shape] state, t: [B] its time, cond: condition, out: [B, *shape] raw prediction, in the graph of the call.
    """

    role: str
    network: Any
    x: Tensor
    t: Tensor
    cond: Mapping[str, Tensor]
    out: Tensor


_seen: ContextVar[list[Seen] | None] = ContextVar("seen", default=None)


@contextmanager
def seen_calls() -> Iterator[list[Seen]]:
    """Within the context every whole network call is kept in the yielded list, activations and all, but those under a
    transform of torch.func, whose tensors do not outlive it."""
    kept: list[Seen] = []
    token = _seen.set(kept)
    try:
        yield kept
    finally:
        _seen.reset(token)


def note_seen(seen: Seen) -> None:
    """Keep a finished call if somebody looks."""
    kept = _seen.get()
    if kept is not None and not torch._C._functorch.is_functorch_wrapped_tensor(seen.out):
        kept.append(seen)


_repeating: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar("repeating", default=nullcontext)


@contextmanager
def repeating_within(around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within the context, recomputations of checkpointed calls enter what `around` makes: a backward pass suspends
    modes of torch functions."""
    token = _repeating.set(around)
    try:
        yield
    finally:
        _repeating.reset(token)


@contextmanager
def _again(call: Call | None) -> Iterator[None]:
    with _repeating.get()(), enter(call):
        yield


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """`torch.utils.checkpoint` whose recomputation re-enters the call of the forward pass."""
    call = current_call()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return enter(call), _again(call)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
