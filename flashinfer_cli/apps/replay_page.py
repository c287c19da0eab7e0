"""What `replay` found as one self-contained page: hit ratios, bytes a token and expected tokens a second against cache
size, the gap, recall of guesses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..config import GiB, KiB, MiB, format_size
from . import page
from .charts import Column, Line, Segment, columns, lines
from .recommended import in_rate, recommended_words

BELADY, BY_LAYER, SEVENTH = "part8", "part0", "part9"  # colours that no policy has; the seventh's own is too pale

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
    hits = _curves(points, policies, "hit_ratio")
    hits.append(Line("chance", "other", [(p["share"], p["share"]) for p in points]))
    sections = [
        page.section(
            "Hit ratio against cache size",
            "Share of what was asked for that was in the cache.",
            _chart(hits, "Hit ratio by share of the records that are cached", _percent),
        ),
        _bytes(points, policies),
        _rates(found, points, policies),
        page.section(
            "Where the hits are",
            "All that was asked for, by who would have found it.",
            page.legend([(style, words) for _, style, words in GAP]) + _gap(points),
        ),
    ]
    if found["recall"]:
        sections.append(_recall(found["recall"]))
    said = [about, *_as_it_ran(found)]
    head = f"<header><h1>{escape(title)}</h1>{''.join(f'<p>{escape(each)}</p>' for each in said)}</header>"
    return page.page(title, "\n".join((head, *sections)))


def _as_it_ran(found: Mapping[str, Any]) -> list[str]:
    ran = found["as_it_ran"]
    if ran is None:
        return []
    asked, missed = ran["hits"] + ran["misses"], format_size(ran["bytes_per_token"])
    words = (
        f"as it ran, by policy {ran['policy']} with slots for {ran['share']:.1%}: {ran['hits']:,} hits of {asked:,} "
        f"({ran['hit_ratio']:.1%}), {missed} a token missed"
    )
    measured = ran["tokens_per_second"]
    return [words if measured is None else f"{words}, {in_rate(measured)} tok/s measured"]


def _curves(points: Sequence[Mapping[str, Any]], policies: Sequence[str], figure: str, unit: float = 1) -> list[Line]:
    """A figure of each policy, and of Belady's optimum, by the share of the records that are cached."""
    styles = [f"part{number}" if number < 7 else SEVENTH for number in range(1, len(policies) + 1)]
    return [
        *(
            Line(each, style, [(p["share"], p["policies"][each][figure] / unit) for p in points])
            for each, style in zip(policies, styles, strict=True)
        ),
        Line("Belady by layer", BY_LAYER, [(p["share"], p["belady_by_layer"][figure] / unit) for p in points]),
        Line("Belady's optimum", BELADY, [(p["share"], p["belady"][figure] / unit) for p in points]),
    ]


def _chart(curves: Sequence[Line], label: str, up: Callable[[float], str]) -> str:
    legend = page.legend([(line.style, line.name) for line in curves])
    return legend + lines(curves, label=label, across=_percent, up=up)


def _bytes(points: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> str:
    most = max(each["bytes_per_token"] for p in points for each in (*p["policies"].values(), p["belady_by_layer"]))
    unit, name = next(
        ((size, name) for size, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")) if most >= size), (1, "B")
    )
    chart = _chart(
        _curves(points, policies, "bytes_per_token", unit),
        "Bytes a token by share of the records that are cached",
        lambda value: f"{value:.4g} {name}",
    )
    table = _table(points, policies, "bytes_per_token", format_size)
    return page.section("Bytes a token against cache size", "Read from the drive for want of room.", chart + table)


def _rates(found: Mapping[str, Any], points: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> str:
    said = recommended_words(found)
    if found["recommended"] is None:
        return page.section("Expected tokens a second", said, "")
    curves = _curves(points, policies, "tokens_per_second")
    chart = _chart(curves, "Expected tokens a second by share of the records that are cached", lambda v: f"{v:,.4g}")
    table = _table(points, policies, "tokens_per_second", in_rate)
    return page.section("Expected tokens a second against cache size", said, chart + table)


def _table(
    points: Sequence[Mapping[str, Any]], policies: Sequence[str], figure: str, write: Callable[[float], str]
) -> str:
    budgets = any(point.get("memory") is not None for point in points)
    header = ["cached", "size", *["--memory"] * budgets, *policies, "Belady by layer", "Belady"]
    body = []
    for point in points:
        found = (*(point["policies"][name] for name in policies), point["belady_by_layer"], point["belady"])
        memory = [format_size(point["memory"]) if point["memory"] is not None else "–"] if budgets else []
        cells = [
            f"{point['share']:.0%}",
            format_size(point["bytes"]),
            *memory,
            *(write(each[figure]) for each in found),
        ]
        body.append([escape(cell) for cell in cells])
    return page.table(header, body, left=())


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
