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

from diffdistill.autodiff import moves, transforms, unwrapped
from diffdistill.errors import UserError


@dataclass(frozen=True)
class Call:
    """role: name of the role.  t: [B] time.  step, w, s: [B] extra inputs or None, s as the network's time map gives
    it.  seed: of dropout, or None.  questions: how many of equal size lie one after the other in the batch.

    parts: where several roles share the call, the call of each, in the order of their samples in the batch; `role` is
    then their names with + between, and what belongs to a role acts on its part alone.
    """

    role: str
    t: Tensor | None = None
    step: Tensor | None = None
    w: Tensor | None = None
    s: Tensor | None = None
    seed: int | None = None
    questions: int = 1
    parts: tuple[Call, ...] = ()
    _above: dict[float, tuple[bool, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def above(self, bound: float) -> tuple[bool, ...]:
        """Of each sample whether its t, which must be there, lies above `bound`; waits for the device once per call."""
        if bound not in self._above:
            assert self.t is not None
            self._above[bound] = tuple((self.t.detach() > bound).tolist())
        return self._above[bound]

    def rows(self, length: int) -> list[tuple[Call, slice]]:
        """The parts, each with its rows of a tensor [length, ...] inside the network; this call itself without parts.

        A sample may have several rows there, one after the other: frames, tokens.
        """
        if not self.parts:
            return [(self, slice(0, length))]
        sizes = [len(part.t) for part in self.parts if part.t is not None]
        each = length // sum(sizes)  # not divmod, which torch.compile does not know
        if not each or each * sum(sizes) != length:
            found = f"a layer that sees {length} rows for {sum(sizes)} samples"
            raise UserError("together", "needs a network whose layers see every sample", found, "Set it to false.")
        found_rows, start = [], 0
        for part, size in zip(self.parts, sizes, strict=True):
            found_rows.append((part, slice(start, start + each * size)))
            start += each * size
        return found_rows

    def of(self, role: str, x: Tensor) -> list[Tensor]:
        """Of a tensor [rows, ...] inside the network what belongs to `role`, by question."""
        if self.parts:
            return [piece for part, rows in self.rows(len(x)) for piece in part.of(role, x[rows])]
        if self.role != role:
            return []
        return [x] if self.questions == 1 else list(x.chunk(self.questions))

    def added(self, x: Tensor, change: Callable[[Call, slice], Tensor | None]) -> Tensor:
        """x [rows, ...] plus what `change` gives for each part and its rows; None is nothing."""
        found = [(rows, change(part, rows)) for part, rows in self.rows(len(x))]
        if all(more is None for _, more in found):
            return x
        return torch.cat([x[rows] if more is None else x[rows] + more for rows, more in found])


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
class State:
    """What a denoiser is asked about. network: process and kind of the prediction.  x: [B, *shape] before its scaling,
    at time t [B].  cond: condition."""

    role: str
    network: Any
    x: Tensor
    t: Tensor
    cond: Mapping[str, Tensor]


@dataclass(frozen=True)
class Ask:
    """What a role is asked: `function(*inputs)`, a network call of `batch` samples, is due or in progress.

    role: where several share the call, their names with + between.  inputs: nested tuples and mappings of tensors.  x:
    of them, what a gradient would go through.  layers: blocks recorded by an early-stopped call, None for a whole one.
    recordings: what outputs of blocks are being added to, by block.  states: for whole calls of denoisers, one for each
    question in the batch; of several the answer is a sequence, a tensor for each.
    """

    role: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    x: Tensor
    layers: tuple[int, ...] | None = None
    recordings: tuple[dict[int, list[Tensor]], ...] = ()
    states: tuple[State, ...] = ()

    @property
    def batch(self) -> int:
        return len(self.x)


# sees each network call: given what is asked and what answers it, it returns the answer
Watcher = Callable[[Ask, Callable[[], Any]], Any]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def watched() -> bool:
    """Whether anybody watches network calls. In training nobody does: a call costs this question more."""
    return _watcher.get() is not None


def asked(ask: Ask) -> Any:
    """The answer to it, past who watches."""

    def answer() -> Any:
        return ask.function(*ask.inputs)

    watcher = _watcher.get()
    return answer() if watcher is None else watcher(ask, answer)


@contextmanager
def watching(new: Watcher) -> Iterator[None]:
    """Within the context every network call goes through `new`, inside of those who watch already."""
    outer = _watcher.get()

    def both(ask: Ask, answer: Callable[[], Any]) -> Any:
        return new(ask, answer if outer is None else lambda: outer(ask, answer))

    token = _watcher.set(both)
    try:
        yield
    finally:
        _watcher.reset(token)


def tensors(out: Any) -> list[Tensor]:
    """The answer of a network call, one tensor or several, as a list."""
    return [out] if isinstance(out, Tensor) else list(out)


@dataclass(frozen=True)
class Pass:
    """One network call of a training step. backward: its output has a graph; through_input: that graph reaches its
    input.  layers: blocks recorded by an early-stopped call, None for a whole one.  jvp: with a derivative by forward
    mode."""

    role: str
    batch: int
    backward: bool
    through_input: bool
    layers: tuple[int, ...] | None = None
    jvp: bool = False


@contextmanager
def recorded_passes() -> Iterator[list[Pass]]:
    """Within the context every network call is noted in the yielded list when it has ended."""
    noted: list[Pass] = []

    def note(ask: Ask, answer: Callable[[], Any]) -> Any:
        out = answer()
        graph = any(unwrapped(tensor).requires_grad for tensor in tensors(out))
        noted.append(Pass(ask.role, ask.batch, graph, ask.x.requires_grad and graph, ask.layers, "Jvp" in transforms()))
        return out

    with watching(note):
        yield noted


@dataclass(frozen=True)
class Seen(State):
    """With what came out: [B, *shape], the raw prediction, in the graph of the call."""

    out: Tensor


@contextmanager
def seen_calls() -> Iterator[list[Seen]]:
    """Within the context every whole network call is kept in the yielded list, activations and all, but those without
    a graph that are part of a derivative. Questions that shared a call are listed one by one."""
    kept: list[Seen] = []

    def keep(ask: Ask, answer: Callable[[], Any]) -> Any:
        out = answer()
        for state, one in zip(ask.states, tensors(out) if ask.states else (), strict=True):
            bare = unwrapped(one)
            if bare.requires_grad or not moves(one):
                cond = {key: unwrapped(value) for key, value in state.cond.items()}
                kept.append(Seen(state.role, state.network, unwrapped(state.x), unwrapped(state.t), cond, bare))
        return out

    with watching(keep):
        yield kept


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
