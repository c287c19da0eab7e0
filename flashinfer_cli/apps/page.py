"""What pages of charts are made of: the frame, sections, legends, tables, and figures as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .page_style import STYLE


def page(title: str, body: str) -> str:
    """A self-contained page; the title is text, the body HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, note: str, content: str) -> str:
    said = f"<p class='note'>{escape(note[:1].upper() + note[1:])}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    keys = (f"<span><i class='key {style}'></i>{escape(words)}</span>" for style, words in entries)
    return "<p class='legend'>" + "".join(keys) + "</p>"


def table(header: Sequence[str], lines: Iterable[Sequence[str]], left: Sequence[int]) -> str:
    """`header` is text, the cells of `lines` are HTML already."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=left' if i in left else ''}>{value}</{tag}>" for i, value in enumerate(values))

    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    head = cells("th", [escape(each) for each in header])
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"


def count(value: float) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"


def rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"
