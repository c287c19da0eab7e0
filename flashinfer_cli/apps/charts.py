"""The few kinds of charts that reports need, as SVG text. Colours are CSS classes, so that a page can be light or dark.

Every mark has a <title>, which browsers show on hovering; every text is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, isfinite, log10

WIDTH = 900  # of every chart, in SVG's own units: the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 14, 34


@dataclass(frozen=True)
class Segment:
    """A part of a bar: its share of the axis, its class for colour, and what to say on hovering."""

    value: float
    style: str
    title: str


@dataclass(frozen=True)
class Column:
    """A column of a chart, its segments stacked from below."""

    label: str
    segments: Sequence[Segment]


@dataclass(frozen=True)
class Bar:
    """A row of a horizontal chart: a name, a bar of segments, and a figure behind it."""

    label: str
    segments: Sequence[Segment]
    figure: str = ""


@dataclass(frozen=True)
class Line:
    """A named curve through points (x, y)."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A line across a chart at a value."""

    value: float
    label: str


def nice_ticks(top: float, count: int = 4) -> list[float]:
    """Round values from 0 on, the last at or above `top`."""
    if not isfinite(top) or top <= 0:
        return [0.0, 1.0]
    rough = top / count
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    ticks = [0.0]
    while ticks[-1] < top * 0.999:
        ticks.append(round(ticks[-1] + step, 12))
    return ticks


def columns(
    bars: Sequence[Column],
    *,
    label: str,
    unit: Callable[[float], str],
    height: int = 220,
    mark: Mark | None = None,
    labels_every: int | None = None,
) -> str:
    """Upright columns over a common axis; `unit` writes the axis' values, `label` says what the chart shows."""
    tops = [sum(_positive(segment.value) for segment in bar.segments) for bar in bars]
    ticks = nice_ticks(max([*tops, mark.value if mark else 0.0], default=0.0))
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    base = _TOP + plot_height
    pitch = plot_width / max(len(bars), 1)
    thick = min(pitch * 0.78, 46) if pitch > 3 else pitch
    every = labels_every or max(1, round(len(bars) / 16))

    def y(value: float) -> float:
        return base - plot_height * value / ticks[-1]

    out = []
    for tick in ticks:
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(_text(_LEFT - 8, y(tick) + 4, unit(tick), "axis end"))
    for index, bar in enumerate(bars):
        x, below = _LEFT + pitch * index + (pitch - thick) / 2, 0.0
        for segment in bar.segments:
            value = _positive(segment.value)
            if value:
                out.append(_rect(x, y(below + value), thick, y(below) - y(below + value), segment))
            below += value
        if index % every == 0:
            out.append(_text(x + thick / 2, base + 17, bar.label, "axis middle"))
    if mark is not None:
        out.append(
            f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(mark.value):.1f}" y2="{y(mark.value):.1f}"/>'
        )
        out.append(_text(WIDTH - _RIGHT, y(mark.value) - 5, mark.label, "marked end"))
    return _svg(height, label, out)


def rows(
    bars: Sequence[Bar], *, label: str, top: float | None = None, marks: Sequence[Mark] = (), thick: int = 26
) -> str:
    """Lying bars on a common axis that ends at `top` (else at the longest), names left, figures right."""
    left, right = 120, 170 if any(bar.figure for bar in bars) else _RIGHT
    longest = max((sum(_positive(segment.value) for segment in bar.segments) for bar in bars), default=0.0)
    scale = (WIDTH - left - right) / max(top or longest, longest, 1e-12)
    head = 18 if marks else 4
    height = head + len(bars) * (thick + 12) + 4
    out = []
    for index, bar in enumerate(bars):
        upper, x = head + index * (thick + 12), float(left)
        out.append(_text(left - 10, upper + thick / 2 + 4, bar.label, "name end"))
        out.append(
            f'<rect class="trough" x="{left}" y="{upper}" width="{WIDTH - left - right}" height="{thick}" rx="4"/>'
        )
        for segment in bar.segments:
            length = _positive(segment.value) * scale
            if length:
                out.append(_rect(x, upper, length, thick, segment))
            x += length
        if bar.figure:
            out.append(_text(WIDTH - right + 10, upper + thick / 2 + 4, bar.figure, "figure"))
    for mark in marks:
        x = left + mark.value * scale
        out.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{head - 4}" y2="{height - 6}"/>')
        # a label near the right edge would leave the chart
        near_edge = x > WIDTH - right - 100
        out.append(_text(x - 4 if near_edge else x + 4, 11, mark.label, "marked end" if near_edge else "marked"))
    return _svg(height, label, out)


def lines(
    curves: Sequence[Line],
    *,
    label: str,
    across: Callable[[float], str],
    up: Callable[[float], str],
    height: int = 300,
) -> str:
    """Curves over common axes that begin at zero; `across` and `up` write the values of the axes."""
    right = nice_ticks(max((x for curve in curves for x, _ in curve.points), default=0.0))
    upper = nice_ticks(max((_positive(y) for curve in curves for _, y in curve.points), default=0.0))
    base = height - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        width = WIDTH - _LEFT - _RIGHT
        return _LEFT + width * x / right[-1], base - (base - _TOP) * _positive(y) / upper[-1]

    out = []
    for tick in upper:
        y = place(0, tick)[1]
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(_LEFT - 8, y + 4, up(tick), "axis end"))
    out += [_text(place(tick, 0)[0], base + 17, across(tick), "axis middle") for tick in right]
    for curve in curves:
        places = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline class="line {escape(curve.style)}" points="{path}"/>')
        for (x, y), (at, value) in zip(places, curve.points, strict=True):
            title = escape(f"{curve.name}: {up(value)} at {across(at)}")
            out.append(
                f'<circle class="{escape(curve.style)}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>'
            )
    return _svg(height, label, out)


def _positive(value: float) -> float:
    return value if isfinite(value) and value > 0 else 0.0


def _rect(x: float, y: float, width: float, height: float, segment: Segment) -> str:
    box = f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.5):.2f}" height="{max(height, 0.5):.2f}"'
    return f'<rect class="{escape(segment.style)}" {box}><title>{escape(segment.title)}</title></rect>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(height: int, label: str, marks: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return "".join((head, *marks, "</svg>"))
