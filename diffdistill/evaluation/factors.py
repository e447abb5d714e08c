"""Why a few-step student with sparse attention is fast: fewer steps times cheaper steps, each beside its quality.

Timed on one thread by the CPU's clock (a GPU: waited for, by the wall's), in one process, rounds interleaved, medians.
Dense attention is this package's own with every block on, or torch's where that is faster, so that the factor of the
masks is theirs alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.evaluation import harness
from diffdistill.evaluation.harness import Evaluation
from diffdistill.generator import Generator
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.masks.full import Full
from diffdistill.machine import machine
from diffdistill.networks.attention import Attention, RoleAttention, sdpa, set_attention
from diffdistill.networks.block_sparse import BlockSparse
from diffdistill.rng import Rng

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffdistill.recipe import Recipe

SCHEMA = 1
ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """Seconds of one sample, and those of its self-attention, medians."""

    seconds: float
    attention_seconds: float


@dataclass(frozen=True)
class Factors:
    """steps: the teacher's sampler, guidance included, over the student's steps made densely.  attention: those over
    the student's sparse ones.  attention_alone: the same of self-attention.  product: of the first two, the whole
    speed-up."""

    steps: float
    attention: float
    attention_alone: float
    product: float


@dataclass
class _Clock:
    """Adds up what an attention takes. seconds: so far."""

    inner: Attention
    device: torch.device
    seconds: float = 0.0
    cross: bool = False  # its time is not self-attention's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layout: BlockLayout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        started = _now(self.device)
        out = self.inner(q, k, v, scale=scale, layout=layout, mask=mask)
        self.seconds += _now(self.device) - started
        return out

    def ready(self) -> None:
        self.inner.ready()

    def explain(self) -> str:
        return self.inner.explain()


def report(recipe: Recipe, evaluation: Evaluation, summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Time and measure, write factors.json and factors.md into `folder`, and return what the first holds.

    summary: of the run, whose figures of teacher and student are taken over; the teacher at the student's number of
    steps is drawn and measured here. Raises UserError for a student without masks or steps.
    """
    generator, sparse = recipe.distiller.generator, attention_of(recipe)
    assert isinstance(generator, Generator)
    steps = len(generator.times)
    costs = timed(recipe, generator, sparse)
    networks = recipe.networks
    few, _ = harness.evaluate(
        recipe.sampler.with_steps(steps), recipe.data, evaluation, networks.device, networks.dtype
    )
    many = len(recipe.sampler.times) - 1
    factors = Factors(
        steps=costs["many"].seconds / costs["few"].seconds,
        attention=costs["few"].seconds / costs["sparse"].seconds,
        attention_alone=costs["few"].attention_seconds / costs["sparse"].attention_seconds,
        product=costs["many"].seconds / costs["sparse"].seconds,
    )
    found = {
        "schema": SCHEMA,
        "machine": {**machine(), "threads": 1},
        "masks": sparse.explain(),
        "rows": [
            {"name": f"teacher, {many} dense steps", **asdict(costs["many"]), "figures": summary["teacher"]},
            {"name": f"{steps} dense steps, the teacher's figures", **asdict(costs["few"]), "figures": few},
            {"name": f"student, {steps} sparse steps", **asdict(costs["sparse"]), "figures": summary["student"]},
        ],
        "factors": asdict(factors),
    }
    (folder / "factors.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "factors.md").write_text(table(found))
    return found


def check(recipe: Recipe) -> None:
    """Refuse, before any work, a run whose student has no masks or no steps to count."""
    generator = recipe.distiller.generator
    if not isinstance(generator, Generator) or not isinstance(generator.student, Denoiser):
        found = type(generator.student if isinstance(generator, Generator) else generator).__name__
        raise UserError("evaluation.factors", "needs a denoiser of few steps as student", found, "Set it to false.")
    attention_of(recipe)


def attention_of(recipe: Recipe) -> BlockSparse:
    """The masks of the recipe's student."""
    network = recipe.networks["student"].network
    for module in network.modules():
        processor = getattr(module, "processor", None)
        attention = processor.by_role.get("student") if isinstance(processor, RoleAttention) else None
        if isinstance(attention, BlockSparse):
            return attention
    fix = "Set attention.student, or evaluation.factors=false."
    raise UserError("evaluation.factors", "needs a student with block-sparse attention", "stock attention", fix)


def timed(recipe: Recipe, generator: Generator, sparse: BlockSparse, rounds: int = ROUNDS) -> dict[str, Cost]:
    """Costs of a sample by name: many (the teacher's sampler), few (the student's steps, dense), sparse (as they are).

    All on the student's network without its role's adapters, as an export has it.
    """
    student = generator.student
    assert isinstance(student, Denoiser)
    device, network = recipe.networks.device, student.network
    dense = _faster(recipe, network, device)
    roles = {"many": dense, "few": dense, "sparse": sparse}
    clocks = {name: _Clock(attention, device) for name, attention in roles.items()}
    samplers: dict[str, Any] = {
        "many": replace(recipe.sampler, denoiser=replace(recipe.sampler.denoiser, network=network, role="many")),
        "few": replace(generator, student=replace(student, role="few")),
        "sparse": replace(generator, student=replace(student, role="sparse")),
    }
    with _installed(network, clocks), _one_thread():
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
        for index in range(rounds + 1):
            for name, sampler in samplers.items():
                if name == "many" and index > 3:  # as long as ten of the others
                    continue
                found = _seconds(recipe, sampler, clocks[name], index)
                if index:  # the first one warms up
                    seconds[name].append(found)
    return {name: Cost(*(statistics.median(x) for x in zip(*rows, strict=True))) for name, rows in seconds.items()}


def _faster(recipe: Recipe, network: Any, device: torch.device) -> Attention:
    """Whichever dense attention takes less of a network call: torch's, or this package's with every block on."""
    found: dict[str, float] = {}
    ways: dict[str, Attention] = {"torch": sdpa, "own": BlockSparse(mask=Full())}
    rng = Rng(0, 0, "factors", range(1), device)
    x, t = rng.normal((1, *recipe.data.shape), torch.float32), torch.full((1,), 0.5, device=device)
    for name, attention in ways.items():
        clock = _Clock(attention, device)
        with _installed(network, {name: clock}), _one_thread(), torch.no_grad():
            for _ in range(3):
                clock.seconds = 0.0
                Denoiser(network, name)(x, t, recipe.data.conditions(rng))
                found[name] = min(found.get(name, float("inf")), clock.seconds)
    return ways[min(found, key=lambda name: found[name])]


def _seconds(recipe: Recipe, sampler: Any, clock: _Clock, index: int) -> tuple[float, float]:
    """Seconds of one sample and of its attention."""
    rng = Rng(0, index, "factors", range(1), recipe.networks.device)
    z, cond = rng.normal((1, *recipe.data.shape), recipe.networks.dtype), recipe.data.conditions(rng)
    clock.seconds, started = 0.0, _now(clock.device)
    sampler.sample(z, cond, rng)
    return _now(clock.device) - started, clock.seconds


@contextmanager
def _installed(network: Any, clocks: Mapping[str, _Clock]) -> Iterator[None]:
    """Within the context self-attention of these roles runs by the clocks."""
    modules = [m for m in network.modules() if isinstance(getattr(m, "processor", None), RoleAttention)]
    before = {id(module): dict(module.processor.by_role) for module in modules}
    for name, clock in clocks.items():
        set_attention(network.backbone, clock, roles=(name,))
    try:
        yield
    finally:
        for module in network.modules():
            processor = getattr(module, "processor", None)
            if isinstance(processor, RoleAttention):
                processor.by_role.clear()
                processor.by_role.update(before.get(id(module), {}))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def table(found: Mapping[str, Any]) -> str:
    """factors.md: the rows with their figures, the factors, the machine."""
    names = [k for k in found["rows"][-1]["figures"] if k not in ("nfe", "latency_ms") and not k.endswith("_ci")]
    lines = [f"| | seconds | of attention | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for row in found["rows"]:
        cells = [f"{row['figures'][name]:.4g}" if name in row["figures"] else "-" for name in names]
        lines.append(f"| {row['name']} | {row['seconds']:.3g} | {row['attention_seconds']:.3g} | {' | '.join(cells)} |")
    f = found["factors"]
    told = (
        f"Fewer steps: {f['steps']:.1f}x. Sparse steps: {f['attention']:.2f}x, attention alone "
        f"{f['attention_alone']:.2f}x. Together: {f['product']:.1f}x."
    )
    return "\n".join([*lines, "", told, "", f"Seconds of one sample. Masks: {found['masks']}.", ""])
