"""A loss curve as a picture of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .charts import nice_ticks

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 30, 34
POINTS = 300


def curve(history: Sequence[dict[str, Any]], title: str) -> str:
    """SVG of training loss (averaged over neighbouring steps) and held-out loss against steps."""
    steps = max(row["step"] for row in history)
    size = max(1, len(history) // POINTS)
    groups = [history[i : i + size] for i in range(0, len(history), size)]
    trained = [(g[-1]["step"], sum(row["loss"] for row in g) / len(g)) for g in groups]
    held = [(row["step"], row["held_out"]) for row in history if "held_out" in row]
    ticks = nice_ticks(max(loss for _, loss in trained))

    def place(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / steps
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / ticks[-1]
        return f"{x:.1f},{y:.1f}"

    marks = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        y = place(0, tick).split(",")[1]
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(steps):
        if tick <= steps:
            middle = place(tick, 0).split(",")[0]
            marks.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{tick:g}</text>')
    for points, colour in ((trained, "#4878a8"), (held, "#c8553d")):
        line = " ".join(place(*point) for point in points)
        marks.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    for name, colour, x in (("training", "#4878a8", 470), ("held out", "#c8553d", 560)):
        marks.append(f'<text x="{x}" y="18" fill="{colour}">{name}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    return f'{head} font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(marks)}</svg>\n'
