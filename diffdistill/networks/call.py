"""The network call in progress: which role runs, at which time, with which extra inputs.

A view of a network enters one `Call`; LoRA linears, extra-input embedders and attention processors inside the network
read it, so that one shared backbone can be the teacher, the student and the fake score. Recomputation (activation
checkpointing) re-enters the call of the forward pass it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Call:
    """role: name of the role.  t: [B] time.  step, w, s: [B] extra inputs or None.  seed: of dropout, or None."""

    role: str
    t: Tensor | None = None
    step: Tensor | None = None
    w: Tensor | None = None
    s: Tensor | None = None
    seed: int | None = None


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


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """`torch.utils.checkpoint` whose recomputation re-enters the call of the forward pass."""
    call = current_call()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return enter(call), enter(call)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
