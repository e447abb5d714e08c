"""Curves and points as SVG text for a page: colours are the page's (classes c0 to c5, currentColor), names escaped."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
COLOURS = 6
MOST = 240  # points of a curve; beyond, each is the mean of its neighbours
WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
TICKS = 4
TINY = 1e-30  # what is below, or above its inverse, is no figure for a logarithm


@dataclass(frozen=True)
class Curve:
    """name: of the legend.  points: (x, y), in order of x; those that are not finite are left out.  low, high: of an
    interval at each point; () where there is none."""

    name: str
    points: Sequence[Point]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    @property
    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if math.isfinite(y)]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value
        )  # fmt: skip
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, -(-(last - first) // TICKS))
            tens = [10.0**power for power in range(first, last + 1, every)]
            found = [tick for tick in tens if self.low <= tick <= self.high]
            if len(found) > 1:
                return found
            finer = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
            found = [tick for tick in finer if self.low <= tick <= self.high]
            if len(found) > 1:
                return found
        raw = (self.high - self.low) / TICKS
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(curves: Sequence[Curve], levels: Mapping[str, float] | None = None, what: str = "") -> Markup:
    """Curves over steps, with horizontal dashed lines at `levels`; the vertical axis is logarithmic where all is above
    0 and spans more than a factor of 30. what: for those who cannot see it.

    Of more than 240 points each drawn one is the mean of its neighbours.
    """
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    shown = [_thinned(curve) for curve in curves]
    heights = [y for curve in shown for _, y in curve.finite]
    heights += [y for curve in shown for y in (*curve.low, *curve.high) if math.isfinite(y)]
    if not heights:
        return Markup("")
    x = _axis([x for curve in shown for x, _ in curve.finite], LEFT, WIDTH - RIGHT, log=False)
    y = _axis([*heights, *levels.values()], HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y)]
    for name, value in levels.items():
        at = y.at(value) if not y.log or value > 0 else y.start
        parts.append(
            f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"><title>{escape(name)}: {number(value)}'
            "</title></path>"
        )
    for index, curve in enumerate(shown):
        parts.append(_curve(curve, index, x, y))
    return _svg(parts, WIDTH, HEIGHT, what)


def _curve(curve: Curve, index: int, x: _Axis, y: _Axis) -> str:
    points = curve.finite
    colour = f"c{index % COLOURS}"
    parts = []
    for (at, value), low, high in zip(curve.points, curve.low, curve.high, strict=False):
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(value)):
            continue
        ends = [max(end, y.low) for end in (low, high)]
        told = f"{curve.name} at step {at:g}: {number(value)} [{number(low)}, {number(high)}]"
        parts.append(
            f'<path class="whisker" d="M{x.at(at):.1f} {y.at(ends[0]):.1f}V{y.at(ends[1]):.1f}">'
            f"<title>{escape(told)}</title></path>"
        )
    drawn = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in points)
    if points:
        parts.append(f'<path class="line" d="M{drawn}"/>')
    if len(points) <= 30:
        dots = "".join(f"M{x.at(a):.1f} {y.at(b):.1f}h0" for a, b in points)
        parts.append(f'<path class="dots" d="{dots}"/>')
    return f'<g class="{colour}">{"".join(parts)}</g>'


def cost_chart(
    points: Mapping[str, Point], lines: Mapping[str, float], labels: tuple[str, str], marks: Mapping[str, str]
) -> Markup:
    """(cost, distance) of methods on logarithmic axes, each under its mark, and distances without a cost as lines."""
    if not points:
        return Markup("")
    width, height = 640, 320
    x = _axis([cost for cost, _ in points.values()], LEFT, width - 24, log=True, margin=0.08)
    y = _axis([*(d for _, d in points.values()), *lines.values()], height - 38, 16, log=True, margin=0.06)
    parts = [_frame(x, y, width, height - 14)]
    for name, value in lines.items():
        at = y.at(value)
        parts.append(f'<path class="level" d="M{LEFT} {at:.1f}H{width - 24}"/>')
        parts.append(f'<text class="tick" x="{width - 26}" y="{at - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for name, (cost, distance) in points.items():
        a, b = x.at(cost), y.at(distance)
        told = f"{name}: {number(cost)}, {number(distance)}"
        parts.append(
            f'<g class="c0"><path class="dots" d="M{a:.1f} {b:.1f}h0"><title>{escape(told)}</title></path></g>'
            f'<text class="mark" x="{a + 6:.1f}" y="{b - 5:.1f}">{escape(marks[name])}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(LEFT + width) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        f"{escape(labels[0])}</text>"
    )
    return _svg(parts, width, height, f"{labels[1]} against {labels[0]}")


def scatter(
    points: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], frame: tuple[Point, Point]
) -> Markup:
    """Points [n][d] over reference [m][d] in a square; frame: (low, high) across and up. One coordinate becomes a
    histogram, of more than two the first two are shown. Points that lie outside are left out; `outside` counts them."""
    size = 120
    (left, right), (bottom, top) = frame

    def place(rows: Sequence[Sequence[float]]) -> str:
        return "".join(
            f"M{(row[0] - left) / (right - left) * size:.1f} {size - (row[1] - bottom) / (top - bottom) * size:.1f}h0"
            for row in rows
            if inside(row, frame)
        )

    if points and len(points[0]) == 1:
        drawn = [_bars([row[0] for row in rows], left, right, size) for rows in (reference, points)]
        kinds = ("bars reference", "bars")
    else:
        drawn, kinds = [place(reference), place(points)], ("dots reference", "dots")
    parts = [f'<path class="{kind}" d="{path}"/>' for kind, path in zip(kinds, drawn, strict=True) if path]
    return _svg([f'<g class="c0">{"".join(parts)}</g>'], size, size, f"{len(points)} points")


def inside(row: Sequence[float], frame: tuple[Point, Point]) -> bool:
    """Whether a point lies in the frame; one that is not finite does not."""
    return all(low <= value <= high for value, (low, high) in zip(row, frame, strict=False))


def _bars(values: Sequence[float], left: float, right: float, size: int, num: int = 40) -> str:
    found = [0] * num
    for value in values:
        if left <= value < right:
            found[int((value - left) / (right - left) * num)] += 1
    top = max(found) or 1
    width = size / num
    return "".join(
        f"M{index * width:.1f} {size}v{-count / top * size * 0.95:.1f}h{width:.1f}V{size}z"
        for index, count in enumerate(found)
        if count
    )


def number(value: float, digits: int = 3) -> str:
    """Few significant digits, short."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, _, power = text.partition("e")
        return f"{mantissa}e{int(power)}"
    return text


def _thinned(curve: Curve) -> Curve:
    if len(curve.points) <= MOST or curve.low:
        return curve
    points, size = curve.finite, -(-len(curve.points) // MOST)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return Curve(curve.name, [(block[-1][0], statistics.fmean(y for _, y in block)) for block in blocks])


def _axis(values: Iterable[float], start: float, end: float, log: bool | None = None, margin: float = 0.0) -> _Axis:
    found = [value for value in values if math.isfinite(value)]
    low, high = min(found), max(found)
    if log is None:
        log = low > 30 * TINY and 30 * low < high < 1 / TINY
        margin = 0.05
    if log:
        low, high = (low / 1.5, high * 1.5) if high < 1.01 * low else (low, high)
        grow = (high / low) ** margin
        return _Axis(low / grow, high * grow, True, start, end)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30) or high == low:
        half = abs(low) * 0.1 or 1.0
        low, high = low - half, high + half
    grow = (high - low) * margin
    return _Axis(low - grow, high + grow, False, start, end)


def _frame(x: _Axis, y: _Axis, width: int = WIDTH, height: int = HEIGHT) -> str:
    parts = []
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{x.end:.0f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        at = x.at(tick)
        anchor = "end" if at > x.end - 12 else "start" if at < LEFT + 12 else "middle"
        parts.append(f'<text class="tick" x="{at:.1f}" y="{height - 8}" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {y.end:.0f}V{y.start:.0f}H{x.end:.0f}"/>')
    return "".join(parts)


def _svg(parts: Sequence[str], width: int, height: int, what: str) -> Markup:
    label = f'role="img" aria-label="{escape(what)}"' if what else 'aria-hidden="true"'
    return Markup(f'<svg viewBox="0 0 {width} {height}" {label}>{"".join(parts)}</svg>')
