"""Questions to a network, and one call of a concatenated batch that answers several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.networks.call import Ask, Call, State, asked, enter, watched

# x_in [B, *shape], t_net [B], t [B], s [B] as the network's time map gives it or None, cond
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Question:
    """What a view asks its network. x: [B, *shape] before its scaling, which lies at time t_state [B].

    together: it may share a call with others.  recordings: what outputs of blocks are being added to.
    """

    role: str
    network: Any
    x: Tensor
    t_state: Tensor
    inputs: Inputs
    together: bool = False
    recordings: tuple[dict[int, list[Tensor]], ...] = ()

    def answer(self) -> Tensor:
        """The raw prediction [B, *shape], by a call of its own."""
        if not watched():
            return self._alone(*self.inputs)
        ask = Ask(self.role, self._alone, self.inputs, self.x, recordings=self.recordings, states=(self.state,))
        answer: Tensor = asked(ask)
        return answer

    @property
    def state(self) -> State:
        """What watchers are told."""
        return State(self.role, self.network, self.x, self.t_state, self.inputs[4])

    @property
    def module(self) -> Any:
        """What runs: the network, or the one that it shows in another process."""
        return getattr(self.network, "unchanged", self.network)

    def fits(self, other: Question) -> bool:
        """Whether one call may answer both: over one network in evaluation mode, for batches that can be concatenated.

        In training mode dropout would be drawn otherwise, and statistics of a batch would mix both.
        """
        if not (self.together and other.together) or self.module is not other.module or self.module.training:
            return False
        ours, theirs = _forms(self.inputs), _forms(other.inputs)
        return ours == theirs and all(shape[:1] == self.x.shape[:1] for shape, _ in ours.values())

    def _alone(self, x_in: Tensor, t_net: Tensor, t: Tensor, s: Tensor | None, cond: Mapping[str, Tensor]) -> Tensor:
        with enter(Call(self.role, t, cond.get("step"), cond.get("w"), s)):
            out: Tensor = self.network(x_in, t_net, cond)
        return out


def answers(questions: Sequence[Question]) -> list[Tensor]:
    """The raw predictions, in the order of the questions, from as few calls as they allow."""
    if len(questions) == 1:
        return [questions[0].answer()]
    groups: list[list[Question]] = []
    for question in questions:
        group = next((group for group in groups if group[0].fits(question)), None)
        if group is None:
            groups.append([question])
        else:
            group.append(question)
    found: dict[int, Tensor] = {}
    for group in groups:
        if len(group) == 1:
            found[id(group[0])] = group[0].answer()
        else:
            roles = [question.role for question in group]
            group = sorted(group, key=lambda question: roles.index(question.role))  # a role's lie side by side
            found |= {id(q): out for q, out in zip(group, _by_one_call(group), strict=True)}
    return [found[id(question)] for question in questions]


def _by_one_call(group: Sequence[Question]) -> Sequence[Tensor]:
    roles = [question.role for question in group]
    module = group[0].module

    def function(*inputs: Inputs) -> Sequence[Tensor]:
        x_in, t_net, _, _, cond = zip(*inputs, strict=True)
        both = {key: torch.cat([one[key] for one in cond]) for key in cond[0]}
        with enter(_call(roles, inputs)):
            out: Tensor = module(torch.cat(x_in), torch.cat(t_net), both)
        return out.split(len(x_in[0]))

    inputs = tuple(question.inputs for question in group)
    if not watched():
        return function(*inputs)
    recordings = {id(found): found for question in group for found in question.recordings}
    states = tuple(question.state for question in group)
    x = torch.cat([question.x for question in group])
    role = "+".join(dict.fromkeys(roles))
    answer: Sequence[Tensor] = asked(
        Ask(role, function, inputs, x, recordings=tuple(recordings.values()), states=states)
    )
    return answer


def _call(roles: Sequence[str], inputs: Sequence[Inputs]) -> Call:
    """The call of a concatenated batch, with a part for each role if there are several."""
    parts = []
    for role in dict.fromkeys(roles):
        mine = [one for one, whose in zip(inputs, roles, strict=True) if whose == role]
        parts.append(_one(role, mine))
    if len(parts) == 1:
        return parts[0]
    return _one("+".join(dict.fromkeys(roles)), inputs, tuple(parts))


def _one(role: str, inputs: Sequence[Inputs], parts: tuple[Call, ...] = ()) -> Call:
    conds = [one[4] for one in inputs]
    step, w = (_cat([cond.get(name) for cond in conds]) for name in ("step", "w"))
    t, s = _cat([one[2] for one in inputs]), _cat([one[3] for one in inputs])
    return Call(role, t, step, w, s, questions=len(inputs), parts=parts)


def _cat(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.cat(there) if len(there) == len(values) else None


def _forms(inputs: Inputs) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types of what is concatenated."""
    x_in, t_net, _, _, cond = inputs
    given = {"": x_in, "t": t_net} | {f"cond.{key}": value for key, value in cond.items()}
    return {key: (value.shape, value.dtype) for key, value in given.items()}
