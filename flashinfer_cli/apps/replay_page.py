"""What `replay` found as one self-contained page: hit ratios against cache size, the gap, recall of guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..config import format_size
from . import page
from .charts import Column, Line, Segment, columns, lines

GAP = (
    ("chance", "other", "chance: a cache of this size, filled blindly"),
    ("policy", "compute", "found by the best policy beyond that"),
    ("order", "wait", "Belady's optimum beyond it"),
    ("room", "part6", "does not fit, even knowing the future"),
    ("cold", "part7", "first uses"),
)


def render(found: Mapping[str, Any]) -> str:
    """The page for what `replay` returns, read back from JSON or not. Every text in it is escaped."""
    name = str(found["about"].get("model") or found["file"])
    title = f"{name} · {found['kind']} replayed"
    points = found["points"]
    policies = list(points[0]["policies"])
    about = (
        f"{found['records']:,} {found['kind']} in {found['layers']} layers, {format_size(found['bytes'])}; "
        f"{found['tokens']:,} tokens of {found['phase']} asked for {found['demanded']:,}"
    )
    curves = [
        Line(each, f"part{index}", [(p["share"], p["policies"][each]["hit_ratio"]) for p in points])
        for index, each in enumerate(policies, 1)
    ]
    curves.append(Line("Belady's optimum", "warm", [(p["share"], p["belady"]["hit_ratio"]) for p in points]))
    curves.append(Line("chance", "other", [(p["share"], p["share"]) for p in points]))
    sections = [
        page.section(
            "Hit ratio against cache size",
            "Share of what was asked for that was in the cache.",
            page.legend([(line.style, line.name) for line in curves])
            + lines(curves, label="Hit ratio by share of the records that are cached", across=_percent, up=_percent),
        ),
        page.section("Bytes a token", "Read from the drive for want of room.", _bytes(points, policies)),
        page.section(
            "Where the hits are",
            "All that was asked for, by who would have found it.",
            page.legend([(style, words) for _, style, words in GAP]) + _gap(points),
        ),
    ]
    if found["recall"]:
        sections.append(_recall(found["recall"]))
    head = f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>"
    return page.page(title, "\n".join((head, *sections)))


def _bytes(points: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> str:
    header = ["cached", "size", *policies, "Belady", "Belady by layer"]
    body = []
    for point in points:
        figures = [point["policies"][name]["bytes_per_token"] for name in policies]
        figures += [point["belady"]["bytes_per_token"], point["belady_by_layer"]["bytes_per_token"]]
        cells = [f"{point['share']:.0%}", format_size(point["bytes"]), *map(format_size, figures)]
        body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _gap(points: Sequence[Mapping[str, Any]]) -> str:
    bars = [
        Column(
            f"{point['share']:.0%}",
            [Segment(point["gap"][key], style, f"{words}: {point['gap'][key]:.1%}") for key, style, words in GAP],
        )
        for point in points
    ]
    return columns(bars, label="What was asked for, by who would have found it", unit=_percent, labels_every=1)


def _recall(found: Sequence[Mapping[str, Any]]) -> str:
    curves = [
        Line(
            f"{each['ahead']} layer{'s' if each['ahead'] > 1 else ''} ahead",
            f"part{index}",
            list(enumerate(each["recall"], 1)),
        )
        for index, each in enumerate(found, 1)
    ]
    longest = max(found, key=lambda each: len(each["chance"]))
    curves.append(Line("chance", "other", list(enumerate(longest["chance"], 1))))
    chart = lines(curves, label="Recall of guesses by their number", across=lambda value: f"{value:g}", up=_percent)
    note = "Share of the needed experts among those guessed, by the number guessed."
    return page.section("Recall of guesses", note, page.legend([(line.style, line.name) for line in curves]) + chart)


def _percent(value: float) -> str:
    return f"{value:.0%}"
