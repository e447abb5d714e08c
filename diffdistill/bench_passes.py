"""The network passes of a training step, to be made again one by one, and answers in the place of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffdistill.autodiff import jvp, moves, transforms, unwrapped
from diffdistill.distillers.base import Phase
from diffdistill.networks.call import Ask, tensors, watching

Direction = Literal["forward", "jvp"]


@dataclass(eq=False)
class Made:
    """A pass as a step made it. whole: false where the network stops at a recorded block.  direction: jvp is with a
    derivative by forward mode.  graph: its output had one; reached: a gradient came back through it.
    """

    phase: Phase
    role: str
    batch: int
    whole: bool
    direction: Direction
    graph: bool
    reached: bool = field(default=False, init=False)
    function: Callable[..., Any] = field(repr=False)
    inputs: tuple[Any, ...] = field(repr=False)  # detached
    moved: tuple[bool, ...] = field(repr=False)  # of the tensors among them, those with a gradient or tangent
    answers: list[Tensor] = field(repr=False)
    # outputs of blocks, by recording; one for each question that the pass answers
    recorded: list[dict[int, list[Tensor]]] = field(repr=False, default_factory=list)

    @property
    def name(self) -> str:
        """What distinguishes it from other passes of the step."""
        what = self.direction if self.whole else "features"
        through = self.direction == "forward" and any(self.moved)
        back = "" if not self.reached else " + backward" + (" through its input" if through else "")
        return f"{self.phase.name}: {self.role} {what}{back}, batch {self.batch}"

    def forward(self) -> list[Tensor]:
        """The network alone on the same input, with a graph if a gradient came back."""
        if self.direction == "jvp":
            return self._with_tangents()
        with torch.set_grad_enabled(self.reached):
            leaves, spec = pytree.tree_flatten(self.inputs)
            fresh = [
                leaf.detach().requires_grad_(moved and self.reached) if isinstance(leaf, Tensor) else leaf
                for leaf, moved in zip(leaves, self.moved, strict=True)
            ]
            return tensors(self.function(*pytree.tree_unflatten(fresh, spec)))

    def tensors(self) -> list[Tensor]:
        """What goes in."""
        return [leaf for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor)]

    def backward(self, outputs: Sequence[Tensor]) -> None:
        """From ones at each output of `forward`."""
        open_ends = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(open_ends, [torch.ones_like(output) for output in open_ends])

    def _with_tangents(self) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(self.inputs)
        places = [place for place, moved in enumerate(self.moved) if moved]

        def function(*primals: Tensor) -> Any:
            fresh = list(leaves)
            for place, primal in zip(places, primals, strict=True):
                fresh[place] = primal
            return self.function(*pytree.tree_unflatten(fresh, spec))

        primals = tuple(leaves[place] for place in places)
        tangents = tuple(torch.ones_like(primal) for primal in primals)
        return tensors(jvp(function, primals, tangents, graph=self.reached)[0])


class Recorder:
    """Keeps every pass made within `during`."""

    def __init__(self) -> None:
        self.passes: list[Made] = []

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        def keep(ask: Ask, answer: Callable[[], Any]) -> Any:
            before = [{layer: len(kept) for layer, kept in one.items()} for one in ask.recordings]
            out = answer()
            leaves, spec = pytree.tree_flatten(ask.inputs)
            by_forward_mode = "Jvp" in transforms()
            moved = tuple(
                isinstance(leaf, Tensor) and (moves(leaf) if by_forward_mode else leaf.requires_grad) for leaf in leaves
            )
            inputs = pytree.tree_unflatten([_plain(leaf) for leaf in leaves], spec)
            found = tensors(out)
            graph = any(unwrapped(tensor).requires_grad for tensor in found)
            direction: Direction = "jvp" if by_forward_mode else "forward"
            blocks = [
                {layer: kept[had[layer] :] for layer, kept in one.items()}
                for one, had in zip(ask.recordings, before, strict=True)
            ]
            made = Made(
                phase, ask.role, ask.batch, ask.layers is None, direction, graph, ask.function, inputs, moved,
                [_plain(tensor) for tensor in found],
                [{layer: [_plain(tensor) for tensor in kept] for layer, kept in one.items()} for one in blocks],
            )  # fmt: skip
            self.passes.append(made)

            def arrived(gradient: Tensor) -> None:
                made.reached = True

            kept = [tensor for one in blocks for found_there in one.values() for tensor in found_there]
            for tensor in (*found, *kept) if graph else ():
                if (bare := unwrapped(tensor)).requires_grad:
                    bare.register_hook(arrived)
            return out

        with watching(keep):
            yield


class _Answered(torch.autograd.Function):
    """A recorded answer with the graph that the network's would have; its gradient ends here, as zeros for inputs."""

    @staticmethod
    def forward(ctx: Any, answer: Tensor, anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.like = [(value.shape, value.dtype, value.device) for value in inputs]
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


@contextmanager
def answered(passes: Sequence[Made]) -> Iterator[None]:
    """Within the context networks are not called: each call gets the answer of the recorded pass whose turn it is."""
    turns = iter(passes)
    anchor = torch.zeros((), requires_grad=True)

    def recall(ask: Ask, answer: Callable[[], Any]) -> Any:
        made = next(turns)
        assert made.role == ask.role, f"a step made other calls before: {made.name}, now of {ask.role}"
        leaves = pytree.tree_leaves(ask.inputs)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

        def given(value: Tensor) -> Tensor:
            if not made.graph:
                return value
            return value + anchor if made.direction == "jvp" else _Answered.apply(value, anchor, *inputs)

        for kept, one in zip(made.recorded, ask.recordings, strict=True):
            for layer, values in kept.items():
                one[layer].extend(given(value) for value in values)
        answers = [given(value) for value in made.answers]
        return answers[0] if made.whole and len(answers) == 1 else answers

    with watching(recall):
        yield


def _plain(leaf: Any) -> Any:
    """A tensor without its graph and without what forward mode gives it."""
    if not isinstance(leaf, Tensor):
        return leaf
    return unwrapped(unwrapped(leaf).detach())  # what is made under a transform is wrapped in it
