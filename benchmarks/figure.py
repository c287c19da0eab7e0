"""A small SVG of bars, so that a figure needs no plotting library."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, ROW, LEFT, RIGHT = 640, 24, 220, 90


def bars(path: Path | None, title: str, values: list[tuple[str, float]], unit: str = "", start: float = 0.0) -> None:
    """Write horizontal bars (label, value) to `path`, if there is one; `start` is where the axis begins."""
    if path is None:
        return
    top = max(value for _, value in values)
    height = 40 + ROW * len(values)
    said = title + (f" (axis from {start:g})" if start else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-weight="bold">{escape(said)}</text>',
    ]
    for index, (label, value) in enumerate(values):
        y = 34 + ROW * index
        length = max(1.0, (WIDTH - LEFT - RIGHT) * (value - start) / max(1e-12, top - start))
        parts.append(f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 7}" fill="#4878a8"/>')
        parts.append(f'<text x="{LEFT + length + 5:.1f}" y="{y + 13}">{value:.4g}{escape(unit)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts) + "</svg>\n", encoding="utf-8")
