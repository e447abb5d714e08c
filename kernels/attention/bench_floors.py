"""The bench's floors: ratios within one run, so that they hold on any machine with the same instructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffdistill.kernels.attention.bench import Measured
    from diffdistill.kernels.attention.bench_threads import Scaling

SHARES = {
    ("bf16", 128): (0.65, 0.85),
    ("bf16", 64): (0.60, 0.80),
    ("fp32", 128): (0.65, 0.82),
    ("fp32", 64): (0.65, 0.82),
}
OVER_FLEX = {"bf16": (4.0, 6.0), "fp32": (1.6, 2.1)}
# At S = 16384, density .1, against gathered blocks through SDPA. Our own gather backend (gather_bmm) has no floor: in
# bf16 its products reach up to a third of the ceiling, so that four times it lies beyond what the processor can do.
OVER_GATHER = {"bf16": (4.0, 5.0), "fp32": (2.2, 2.8)}
OVER_SDPA_BACKWARD = {1.0: (1.7, 2.3), 0.3: (5.0, 7.0), 0.1: (15.0, 22.0)}  # bf16
OVER_MASKS = {"mask of means": (1 / 0.15, 1 / 0.08), "mask of samples": (1 / 0.6, 1 / 0.35)}  # fp32, density .1
LINEARITY = (0.8, 1 / 1.08)  # .1 time(1) / time(.1) at S = 16384
THREADS = (1.7, 2.0)


@dataclass(frozen=True)
class Floor:
    """A ratio, larger is better. least: what must hold.  goal: what is aimed at."""

    name: str
    value: float
    least: float
    goal: float

    @property
    def met(self) -> bool:
        return self.value >= self.least


def floors(measured: Sequence[Measured], threads: Scaling | None) -> list[Floor]:
    """Those that the measurements allow: without a bf16 unit its shares have no ceiling."""
    found = [*_shares(measured), *_rivals(measured), *_masks(measured), *_linearity(measured)]
    if threads is not None:
        found += [Floor(f"two threads over one, {kind}", value, *THREADS) for kind, value in threads.ratios.items()]
    return found


def _shares(measured: Sequence[Measured]) -> Iterator[Floor]:
    for m in measured:
        limits = SHARES.get((m.dtype, m.width))
        if m.runner == "ours" and m.direction == "forward" and m.share is not None and m.length >= 4096 and limits:
            yield Floor(f"share of the ceiling, {_cell(m)}", m.share, *limits)


def _rivals(measured: Sequence[Measured]) -> Iterator[Floor]:
    for m in (m for m in measured if m.runner == "ours"):
        near = [r for r in measured if _group(r) == _group(m)]
        same = [r for r in near if r.density == m.density]
        flex = [r.milliseconds for r in same if r.runner == "flex"]
        gather = [r.milliseconds for r in same if r.runner == "gather_sdpa"]
        dense = [r.milliseconds for r in near if r.runner == "sdpa"]
        if flex:
            yield Floor(f"over flex, {_cell(m)}", flex[0] / m.milliseconds, *OVER_FLEX[m.dtype])
        if gather and m.direction == "forward" and m.length == 16384 and m.density < 0.15:
            yield Floor(f"over gather + SDPA, {_cell(m)}", gather[0] / m.milliseconds, *OVER_GATHER[m.dtype])
        if dense and m.direction == "backward" and m.dtype == "bf16":
            nominal = min(OVER_SDPA_BACKWARD, key=lambda density: abs(density - m.density))
            yield Floor(f"over dense, {_cell(m)}", dense[0] / m.milliseconds, *OVER_SDPA_BACKWARD[nominal])


def _masks(measured: Sequence[Measured]) -> Iterator[Floor]:
    for m in (m for m in measured if m.runner in OVER_MASKS and m.dtype == "fp32"):
        served = [r for r in measured if r.runner == "ours" and _group(r) == _group(m) and r.density == m.density]
        if served:
            name = f"attention over making its {m.runner}, {_cell(m)}"
            yield Floor(name, served[0].milliseconds / m.milliseconds, *OVER_MASKS[m.runner])


def _linearity(measured: Sequence[Measured]) -> Iterator[Floor]:
    for m in (m for m in measured if m.runner == "ours" and m.direction == "forward"):
        full = [r for r in measured if r.runner == "ours" and _group(r) == _group(m) and r.density == 1]
        if full and m.length == 16384 and m.density < 0.15:
            yield Floor(f"linear in density, {_cell(m)}", m.density * full[0].milliseconds / m.milliseconds, *LINEARITY)


def _group(m: Measured) -> tuple[object, ...]:
    return m.length, m.width, m.dtype, m.direction


def _cell(m: Measured) -> str:
    return f"{m.dtype} {m.direction}, S={m.length}, D={m.width}, density {m.density:.2f}"
