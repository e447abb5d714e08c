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

from diffdistill.autodiff import transforms, unwrapped


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
class Ask:
    """What a role is asked: `function(*inputs)`, a network call of `batch` samples, is due or in progress.

    inputs: nested tuples and mappings of tensors.  x: of them, what a gradient would go through.  layers: blocks
    recorded by an early-stopped call, None for a whole one.  recordings: what outputs of blocks are being added to, by
    block.  state: for whole calls of a denoiser, (network, x, t, cond), x [B, *shape] before its scaling and the time
    t [B] at which it lies.
    """

    role: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    x: Tensor
    layers: tuple[int, ...] | None = None
    recordings: tuple[dict[int, list[Tensor]], ...] = ()
    state: tuple[Any, Tensor, Tensor, Mapping[str, Tensor]] | None = None

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


@contextmanager
def seen_calls() -> Iterator[list[Seen]]:
    """Within the context every whole network call is kept in the yielded list, activations and all, but those without
    a graph under a transform of torch.func."""
    kept: list[Seen] = []

    def keep(ask: Ask, answer: Callable[[], Any]) -> Any:
        out = answer()
        if ask.state is not None:
            network, x, t, cond = ask.state
            bare = [unwrapped(value) for value in (x, t, out)]
            if bare[-1] is out or bare[-1].requires_grad:
                cond = {key: unwrapped(value) for key, value in cond.items()}
                kept.append(Seen(ask.role, network, bare[0], bare[1], cond, bare[2]))
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
