"""torch.compile of networks: what may be asked of it, and what it did."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from diffdistill.autodiff import transforms
from diffdistill.errors import UserError
from diffdistill.networks.call import checkpointed

# false | true | a mode of torch.compile; true is its default one
Compile = bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # and what is without


def check_compile(compile: Compile, device: torch.device | str) -> None:
    """Raise UserError for a mode that replays CUDA graphs where there are none: torch would leave them out unsaid."""
    if compile in _CUDA_GRAPHS and torch.device(device).type != "cuda":
        constraint = f"{compile} needs a GPU: it replays CUDA graphs"
        raise UserError("compile", constraint, f"device {device}", f"Set compile={_CUDA_GRAPHS[str(compile)]}.")


def options(compile: Compile) -> dict[str, Any]:
    """Keywords of torch.compile for a value that is not false."""
    assert compile is not False
    return {} if compile is True else {"mode": compile}


# Roles that share a backbone compile it once each, with and without a graph: torch's own limit of 8 is soon reached,
# and beyond it code runs uncompiled.
FORMS = 64
SETTLED = 10  # steps after which every form of a network's calls has been seen


_uncompiled: ContextVar[bool] = ContextVar("uncompiled", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within the context compiled networks run as they are written: for work beside training, whose batch sizes would
    each be compiled, and whose repeated backward passes compiled code does not allow."""
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def compile_network(network: nn.Module, compile: Compile) -> None:
    """torch.compile a network in place, but for calls that are `uncompiled` or under a derivative by forward mode.

    The latter dynamo cannot trace, and after it failed at one, it leaves ordinary calls of the same code uncompiled
    too, unsaid.
    """
    import torch._dynamo  # takes most of a second

    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # as torch 2.6 calls it
    setattr(config, limit, max(FORMS, getattr(config, limit)))
    network.compile(**options(compile))
    compiled, eager = network._compiled_call_impl, network._call_impl
    assert compiled is not None

    def call(*arguments: Any, **keywords: Any) -> Any:
        if _uncompiled.get() or transforms():
            return eager(*arguments, **keywords)
        return compiled(*pytree.tree_map(_dense, arguments), **keywords)

    network._compiled_call_impl = call


def _dense(leaf: Any) -> Any:
    """A null condition is expanded to the batch, with strides of 0, for which code would be compiled once more."""
    return leaf.contiguous() if isinstance(leaf, Tensor) and 0 in leaf.stride() else leaf


def checkpointed_block(function: Callable[..., Any], *arguments: Any) -> Any:
    """As `call.checkpointed`. Compiled code repeats operators, which have read the call when they were traced."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False)
    return checkpointed(function, *arguments)


@dataclass
class Compilations:
    """What torch.compile did since this was made. graphs: that it made.  recompiles: of these, of code for which it had
    one that did not fit.  graph_breaks: places where it gave up and went on after them.  left_eager: functions it could
    not compile at all.  seconds: that all this took.  reasons: of recompiles, as torch words them, with their counts.
    """

    graphs: int = 0
    recompiles: int = 0
    graph_breaks: int = 0
    left_eager: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = next(iter(reversed(_metrics())), None)
        self._graphs, self._breaks = _totals()
        self._settled = self._told = 0

    def look(self) -> Compilations:
        """Itself, up to now; to be called after every step: torch remembers its last 64 compilations."""
        for one in self._new():
            self.seconds += one.entire_frame_compile_time_s or 0.0
            self.left_eager += one.fail_type is not None
            if one.recompile_reason:
                self.recompiles += 1
                reason = _plain(one.recompile_reason)
                self.reasons[reason] = self.reasons.pop(reason, 0) + 1  # the newest stands last
        graphs, breaks = _totals()
        self.graphs, self.graph_breaks = graphs - self._graphs, breaks - self._breaks
        return self

    def alarm(self, step: int) -> str | None:
        """What to tell after a step that should not have compiled any more: first once, then each time that there are
        twice as many."""
        if step <= SETTLED:
            self._settled = self.recompiles
        late = self.recompiles - self._settled
        if late == 0 or late < 2 * self._told:
            return None
        self._told = late
        why = [*self.reasons][-1]
        return f"torch.compile compiled again after step {SETTLED}, {late} time(s) up to step {step}; the last: {why}"

    def to_json(self) -> dict[str, Any]:
        whole = ("graphs", "recompiles", "graph_breaks", "left_eager")
        counts = {name: getattr(self, name) for name in whole}
        return {**counts, "seconds": round(self.seconds, 2), "reasons": dict(self.reasons)}

    def figures(self) -> dict[str, float]:
        """For a line of metrics.jsonl."""
        return {"time/recompiles": float(self.recompiles), "time/compile_seconds": self.seconds}

    def _new(self) -> list[Any]:
        found = []
        for one in reversed(_metrics()):
            if one is self._last:
                break
            found.append(one)
        if found:
            self._last = found[0]
        return found[::-1]


def _metrics() -> Any:
    """torch's records of its last compilations, the oldest first; it has no public count of recompiles."""
    from torch._dynamo.utils import get_compilation_metrics  # takes most of a second

    return get_compilation_metrics()


def _totals() -> tuple[int, int]:
    """Graphs and graph breaks of this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _plain(reason: str) -> str:
    """One line, without the number of the form that did not fit."""
    return re.sub(r"^\d+/\d+: ", "", " ".join(reason.split()))[:300]
