"""A step of training looked at without being taken: gradients by term, times, and whether critics have kept up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase
from diffdistill.networks.call import Seen, seen_calls
from diffdistill.networks.roles import Networks
from diffdistill.process import X0, expand
from diffdistill.rng import Rng
from diffdistill.shards import is_sharded, norm

AHEAD = 32  # steps among which one with all phases is looked for
STUDENT = "student"
PER_LEVEL = 16  # samples of one noise level that a critic is judged on


@dataclass(frozen=True)
class Looked:
    """A phase that was run: its loss in its graph and the calls in it."""

    phase: Phase
    loss: Loss
    calls: Sequence[Seen]

    def of(self, role: str, graph: bool) -> list[Seen]:
        """The calls of a role with a graph, or those without."""
        return [call for call in self.calls if call.role == role and call.out.requires_grad == graph]


@contextmanager
def untouched(distiller: Distiller, networks: Networks, step: int) -> Iterator[None]:
    """Within, phases may be run: torch's generators, dropout, and the method's own state are as before afterwards."""
    state = distiller.state_dict()
    active = networks.training
    devices = [networks.device] if networks.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            networks.train_only(active)
            distiller.load_state_dict(state)
            distiller.phases(step)  # some methods keep the stage of the last step they were asked about


def phases_of(distiller: Distiller, step: int, among: int) -> tuple[int, Sequence[Phase]]:
    """Of `among` steps from `step` on the first one with most phases, and those."""
    due = max(range(step, step + among), key=lambda at: len(distiller.phases(at)))
    return due, distiller.phases(due)


def look(
    phase: Phase, batch: Batch, rng: Rng, networks: Networks, around: Callable[[], AbstractContextManager[Any]]
) -> Looked:
    """Run a phase on a batch that no other phase has seen."""
    networks.train_only(phase.trains)
    torch.manual_seed(rng.torch_seed())
    with seen_calls() as calls, around():
        loss = phase.loss(batch, rng)
    return Looked(phase, loss, list(calls))


def term_norms(looked: Looked, networks: Networks, role: str) -> dict[str, float]:
    """Norm of the gradient of each term of the loss at a role's weights."""
    weights = networks.weights(role)
    norms = {}
    for name, term in looked.loss.terms.items():
        if not term.requires_grad:
            continue
        norms[name] = float(norm([g for g in _gradients(term, weights) if g is not None]))
    networks.zero_grad()
    return norms


def _gradients(term: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of a term at weights; sharded ones, of which a graph knows only what was gathered, have theirs in `grad`."""
    if not any(is_sharded(weight) for weight in weights):
        return torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
    for weight in weights:
        weight.grad = None
    term.backward(retain_graph=True)
    return [weight.grad for weight in weights]


def lag(looked: Looked, role: str, keys: Sequence[str]) -> float | None:
    """What a critic still has to learn of samples it is shown: the share of its loss that the plainest correction of
    its output would take away. 0 is an exact critic, 1 one whose whole error is a shift and a scale.

    The error of E[x0 | x_t, c] is orthogonal to every function of (x_t, c). Three are asked: a constant for each
    condition, and within conditions the output itself and the state. The target is read off the critic's own loss,
    which is quadratic in its output: one Newton step leads there. Degrees of freedom are taken off.
    keys: of conditions.
    """
    calls = looked.of(role, True)
    total = looked.loss.total
    if not calls or not total.requires_grad:
        return None
    call = calls[0]
    (slope,) = torch.autograd.grad(total, [call.out], create_graph=True, allow_unused=True)
    if slope is None or not slope.requires_grad:
        return None
    (curve,) = torch.autograd.grad(slope.sum(), [call.out], retain_graph=True, allow_unused=True)
    if curve is None:
        return None
    known = (curve > 0).flatten(1).all(1)
    if int(known.sum()) < 4:
        return None
    return _explained(call, slope.detach(), curve.detach(), known, keys)


def _explained(call: Seen, slope: Tensor, curve: Tensor, known: Tensor, keys: Sequence[str]) -> float:
    """Mean over noise levels of the share of the error that the tests explain."""
    process, kind = call.network.process, call.network.kind
    x, t, out = (v[known].detach() for v in (call.x, call.t, call.out))
    aim = out - slope[known] / curve[known]
    ours, right = (process.convert(v, x, t, kind, X0).double().flatten(1) for v in (out, aim))
    factor = process.convert(out + 1, x, t, kind, X0).double().flatten(1) - ours
    weight = curve[known].double().flatten(1) / factor.square()
    alpha, _ = process.alpha_sigma(t)
    state = (x / expand(alpha, x).clamp(min=1e-3)).double().flatten(1)
    group = _groups({key: call.cond[key][known] for key in keys if key in call.cond}, len(x), x.device)
    order = process.angle(t.double()).argsort()
    bins = max(1, min(4, len(x) // PER_LEVEL))
    shares = [_share(right[i] - ours[i], ours[i], state[i], weight[i], group[i]) for i in order.chunk(bins)]
    found = [share for share in shares if share is not None]
    return sum(found) / len(found) if found else 0.0


def _share(error: Tensor, ours: Tensor, state: Tensor, weight: Tensor, group: Tensor) -> float | None:
    """R^2 of the error's weighted regression on a constant per group and, within groups, two slopes; corrected."""

    def centred(values: Tensor) -> Tensor:
        sums = torch.zeros(int(group.max()) + 1, values.shape[1], dtype=values.dtype, device=values.device)
        mean = sums.index_add(0, group, weight * values) / sums.index_add(0, group, weight)
        return values - mean[group]

    inner, tests = centred(error), torch.stack([centred(ours), centred(state)])
    gram = torch.einsum("aij,bij,ij->ab", tests, tests, weight)
    product = torch.einsum("aij,ij,ij->a", tests, inner, weight)
    scale = gram.diagonal().clamp(min=1e-30).sqrt()
    gram, product = gram / (scale[:, None] * scale), product / scale
    slopes = torch.linalg.solve(gram + 1e-6 * torch.eye(2, dtype=gram.dtype, device=gram.device), product)
    whole, left = float((weight * error.square()).sum()), float((weight * inner.square()).sum() - product @ slopes)
    used = len(group.unique()) * error.shape[1] + 2
    if whole <= 0 or used >= error.numel():
        return None
    return 1 - max(0.0, left) / whole * error.numel() / (error.numel() - used)


def _groups(cond: Cond, size: int, device: torch.device) -> Tensor:
    """Index [B] of the samples with one condition."""
    if not cond:
        return torch.zeros(size, dtype=torch.int64, device=device)
    flat = torch.cat([value.reshape(size, -1).double() for value in cond.values()], 1)
    return torch.unique(flat, dim=0, return_inverse=True)[1].to(device)


def levels(calls: Sequence[Seen]) -> Tensor:
    """log of the noise-to-signal ratio of every sample of calls, [n], on the CPU."""
    found = [call.network.process.angle(call.t.detach().double()).tan().clamp(1e-6, 1e6).log().cpu() for call in calls]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


def repeated(batch: Batch, each: int) -> Batch:
    """The batch with each of its first conditions, and what belongs to it, `each` times."""
    size = batch.shape[0]
    index = torch.arange(0, size).div(each, rounding_mode="floor")

    def take(value: Any) -> Any:
        return value[index.to(value.device)] if isinstance(value, Tensor) else value

    def taken(part: Any) -> Any:
        if part is None:
            return None
        fields = {
            k: ({n: take(x) for n, x in v.items()} if isinstance(v, Mapping) else take(v))
            for k, v in vars(part).items()
        }
        return replace(part, **fields)

    cond = {key: take(value) for key, value in batch.cond.items()}
    return Batch(cond, batch.shape, take(batch.x0), taken(batch.pair), taken(batch.trajectory))
