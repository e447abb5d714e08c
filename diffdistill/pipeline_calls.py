"""The network calls of a diffusers pipeline, recorded as it runs, to be made again alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CODECS = ("encode", "decode")  # methods of a whole component that are no `forward`


@dataclass(eq=False)
class NetworkCall:
    """One call of a pipeline into its networks, the outermost: what lies inside it belongs to it.

    name: component and method, "unet.forward".  arguments, keywords: copies of what went in.  answer: tensors
    of what came out.
    """

    name: str
    module: nn.Module = field(repr=False)
    method: str
    arguments: tuple[Any, ...] = field(repr=False)
    keywords: Mapping[str, Any] = field(repr=False)
    answer: list[Tensor] = field(repr=False, default_factory=list)

    @torch.no_grad()
    def again(self) -> Any:
        """The network alone on the same input; of a compiled module its compiled form."""
        function = self.module if self.method == "forward" else getattr(self.module, self.method)
        return function(*self.arguments, **self.keywords)


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that compute, by their name in it."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


@contextmanager
def recorded_calls(pipeline: Any) -> Iterator[list[NetworkCall]]:
    """Within the context every call into a network of the pipeline is kept in the yielded list, in order.

    None is missed: each module inside a component is watched, and so are the components' codecs. Record before
    compiling: compiled code would trace what watches.
    """
    calls: list[NetworkCall] = []
    depth = [0]
    with ExitStack() as stack:
        for component, network in networks_of(pipeline).items():
            for name, module in network.named_modules(prefix=component):
                methods = ["forward", *(CODECS if module is network else ())]
                for method in methods:
                    if hasattr(module, method):
                        watch = _watched(module, method, f"{name}.{method}", calls, depth)
                        stack.enter_context(_replaced(module, method, watch))
        yield calls


def _watched(
    module: nn.Module, method: str, name: str, calls: list[NetworkCall], depth: list[int]
) -> Callable[..., Any]:
    inner = getattr(module, method)

    @functools.wraps(inner)
    def watch(*arguments: Any, **keywords: Any) -> Any:
        if depth[0]:
            return inner(*arguments, **keywords)
        call = NetworkCall(name, module, method, _copied(arguments), _copied(keywords))
        depth[0] += 1
        try:
            answer = inner(*arguments, **keywords)
        finally:
            depth[0] -= 1
        call.answer = [tensor.clone() for tensor in tensors_in(answer)]  # the pipeline may write into it
        calls.append(call)
        return answer

    return watch


@contextmanager
def _replaced(module: nn.Module, method: str, by: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get(method)  # offloading, for one, leaves a method of its own
    object.__setattr__(module, method, by)
    try:
        yield
    finally:
        object.__delattr__(module, method)
        if own is not None:
            object.__setattr__(module, method, own)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of an answer, whose class torch can take apart."""
    return [leaf.detach() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)
