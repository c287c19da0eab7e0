"""A run's report as one self-contained web page: inline styles, inline charts, nothing fetched, nothing executed."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from statistics import median
from typing import Any

from ..config import format_size
from ..report import PHASES, label
from . import page
from .charts import Bar, Column, Mark, Segment, columns, rows

Report = Mapping[str, Any]
SPLIT = (
    ("wait_seconds", "wait", "waiting for I/O"),
    ("compute_seconds", "compute", "computing"),
    ("other_seconds", "other", "the rest"),
)


def render(report: Report) -> str:
    """The page for a RunReport.to_dict(), read back from JSON or not. Every text in it is escaped."""
    title = f"{report['model'].get('name', 'model')} · genai-run"
    sections = (_head, _warnings, _tiles, _memory, _time, _layers, _experts, _steps, _io)
    body = "\n".join(section(report) for section in sections)
    return page.page(title, body)


# ------------------------------------------------------------------ the top of the page


def _head(report: Report) -> str:
    model = report["model"]
    about = [model.get("model_type"), model.get("kind")]
    if model.get("parameters"):
        about.append(f"{model['parameters'] / 1e6:,.0f} M parameters")
    if model.get("weight_bytes"):
        about.append(f"{format_size(model['weight_bytes'])} of {', '.join(model.get('formats') or ())} weights")
    how = [
        f"{report['device']}, {report['threads']} threads",
        f"{report['kernels']} kernels",
        f"reads {report['direct_io']}",
    ]
    name, badge = escape(str(model.get("name", "model"))), escape(label(report["exactness"], report.get("quality")))
    return (
        f"<header><h1>{name} <span class='badge'>{badge}</span></h1>"
        f"<p>{escape(' · '.join(str(each) for each in about if each))}</p><p>{escape(' · '.join(how))}</p></header>"
    )


def _warnings(report: Report) -> str:
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in report["warnings"])


def _tiles(report: Report) -> str:
    decode, prefill = report["decode"], report["prefill"]
    reading = decode if decode["bytes_read"] else prefill
    tiles: list[tuple[str, ...]] = []
    if decode["tokens"]:
        warm = [step["seconds"] for step in report["steps"][1:]]
        note = f"warm: {1 / median(warm):.2f} tok/s" if warm and median(warm) > 0 else f"{decode['tokens']} tokens"
        tiles.append(("decode", f"{decode['tokens_per_second']:.2f}", "tok/s", note))
    if prefill["tokens"]:
        tiles.append(("prefill", f"{prefill['tokens_per_second']:.1f}", "tok/s", f"{prefill['tokens']} tokens"))
    if report["first_token_seconds"] is not None:
        note = f"{page.seconds(report['load']['seconds'])} of loading aside"
        tiles.append(("first token", f"{report['first_token_seconds']:.2f}", "s", note))
    note = f"{page.share(report['peak'], report['budget'])} of the budget"
    tiles.append(("peak memory", *format_size(report["peak"]).split(" "), note))
    if decode["tokens"]:
        tiles.append(
            ("read a token", *format_size(decode["bytes_per_token"]).split(" "), f"{decode['requests']:,} requests")
        )
    if reading["bytes_read"]:
        rate, drive = reading["read_bytes_per_second"], report.get("drive")
        note = f"{page.share(rate, drive['bytes_per_second'])} of the drive" if drive else "while reading"
        tiles.append(("reading", f"{rate / 1e9:.2f}", "GB/s", note))
    if decode["hit_ratio"] is not None:
        tiles.append(("cache hits", f"{decode['hit_ratio']:.0%}", "", "in decode"))
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small> {escape(unit)}</small></dd><p>{escape(note)}</p></div>"
        for name, value, unit, note in tiles
    )
    return f"<dl class='tiles'>{''.join(cells)}</dl>"


# ------------------------------------------------------------------ memory


def _memory(report: Report) -> str:
    budget, peak = report["budget"], report["peak"]
    planned = [
        Segment(part["planned"], f"part{index}", f"{part['part']}: {format_size(part['planned'])} planned")
        for index, part in enumerate(report["plan"])
    ]
    bars = [
        Bar("planned", planned, format_size(sum(part["planned"] for part in report["plan"]))),
        Bar(
            "peak",
            [Segment(peak, "over" if peak > budget else "peak", f"peak of the process: {format_size(peak)}")],
            format_size(peak),
        ),
    ]
    marks = [
        Mark(report["least"], f"least {format_size(report['least'])}"),
        Mark(budget, f"budget {format_size(budget)}"),
    ]
    chart = rows(bars, label="Memory planned and used, against the budget", top=budget, marks=marks)
    table = page.table(
        ("", "planned", "actual", ""),
        (
            (
                f'<i class="key part{index}"></i>{escape(part["part"])}',
                format_size(part["planned"]),
                "–" if part["actual"] is None else format_size(part["actual"]),
                escape(part["note"]),
            )
            for index, part in enumerate(report["plan"])
        ),
        left=(0, 3),
    )
    stays, streams = format_size(report["resident_bytes"]), format_size(report["streamed_bytes"])
    note = (
        f"Of the weights {stays} stay in memory and {streams} stream from the drive."
        if report["streamed_bytes"]
        else "All weights stay in memory."
    )
    return page.section("Memory", note, chart + table)


# ------------------------------------------------------------------ time


def _time(report: Report) -> str:
    bars, facts = [], []
    for name in PHASES:
        phase = report[name]
        whole = phase["seconds"]
        if not whole:
            continue
        parts = [
            Segment(
                phase[key] / whole,
                style,
                f"{name}, {words}: {page.seconds(phase[key])} ({page.share(phase[key], whole)})",
            )
            for key, style, words in SPLIT
        ]
        bars.append(Bar(name, parts, f"{page.seconds(whole)}, {page.share(phase['wait_seconds'], whole)} waiting"))
        if phase["read_seconds"] and phase["tokens"]:
            facts.append(f"{phase['overlap']:.0%} of the reading of {name} was hidden behind computing")
    if not bars:
        return ""
    note = f"{'; '.join(facts)}." if facts else ""
    return page.section(
        "Time",
        note,
        page.legend((style, words) for _, style, words in SPLIT)
        + rows(bars, label="Time of each phase by what it was spent on", top=1.0),
    )


def _layers(report: Report) -> str:
    charts = []
    last = max((row["layer"] for row in report["layers"]), default=0)
    for phase in ("decode", "prefill"):
        passes = report[phase]["passes"]
        if not passes or not report["layers"]:
            continue
        bars = []
        for row in report["layers"]:
            index = row["layer"]
            name = "emb" if index < 0 else "head" if index == last else str(index)
            wait, compute = row[f"{phase}_wait"] / passes, row[f"{phase}_compute"] / passes
            title = f"layer {name}: {page.seconds(compute)} computing, {page.seconds(wait)} waiting"
            bars.append(Column(name, (Segment(compute, "compute", title), Segment(wait, "wait", title))))
        tokens = report[phase]["tokens"] / passes
        charts.append(f"<h3>{phase}, a pass of {tokens:.0f} token{'s' if tokens > 1 else ''}</h3>")
        charts.append(columns(bars, label=f"Waiting and computing by layer in {phase}", unit=page.seconds))
    if not charts:
        return ""
    return page.section(
        "Layers", "", page.legend((("compute", "computing"), ("wait", "waiting for I/O"))) + "".join(charts)
    )


def _experts(report: Report) -> str:
    """Hits and misses by layer, and how unevenly experts are used."""
    cache, all_rows = report.get("expert_cache"), report.get("experts") or ()
    phase = "decode" if any(row["phase"] == "decode" for row in all_rows) else "prefill"
    found = [row for row in all_rows if row["phase"] == phase]
    if not cache or not found:
        return ""
    bars, lines = [], []
    for row in found:
        name, asked = str(row["layer"]), row["hits"] + row["misses"]
        bars.append(
            Column(
                name,
                [
                    Segment(row["hits"], "compute", f"layer {name}: {row['hits']:,} of {asked:,} found in the cache"),
                    Segment(row["right"], "io", f"layer {name}: {row['right']:,} read ahead of need"),
                    Segment(row["misses"] - row["right"], "wait", f"layer {name}: read when asked for"),
                ],
            )
        )
        recall = next((value for ahead, value in row["recall"].items() if str(ahead) == "1"), None)
        most = max(row["uses"].values(), default=0)
        lines.append(
            (
                escape(name), f"{asked:,}", page.share(row["hits"], asked), "–" if recall is None else f"{recall:.0%}",
                f"{row['guessed']:,}", page.share(row["right"], row["guessed"]), format_size(row["wasted_bytes"]),
                f"{len(row['uses'])}", page.share(most, sum(row["uses"].values())),
            )
        )  # fmt: skip
    header = ("layer", "asked for", "hits", "recall", "read ahead", "right", "wasted", "in use", "most used")
    legend = (("compute", "in the cache"), ("io", "read ahead of need"), ("wait", "read when asked for"))
    policy = " as ".join(dict.fromkeys((cache["policy"], cache["follows"])))
    note = (
        f"{phase}: {cache['slots']:,} of {cache['experts']:,} experts stay, by policy {policy}. "
        f"Reading ahead is {cache['prefetch']['verdict']}."
    )
    chart = columns(bars, label=f"Experts asked for by layer in {phase}", unit=page.count)
    return page.section("Experts", note, page.legend(legend) + chart + page.table(header, lines, left=(0,)))


def _steps(report: Report) -> str:
    steps = report["steps"]
    if not steps:
        return ""
    bars = []
    for index, step in enumerate(steps):
        title = f"step {index + 1}: {page.seconds(step['seconds'])}, {page.seconds(step['wait_seconds'])} waiting"
        title += f", {format_size(step['bytes_read'])} read"
        bars.append(Column(str(index + 1), [Segment(step["seconds"], "warm" if index else "cold", title)]))
    warm = median([step["seconds"] for step in steps[1:]]) if len(steps) > 1 else 0.0
    mark = Mark(warm, f"median of the warm {page.seconds(warm)}") if warm else None
    note = f"The first step took {page.seconds(steps[0]['seconds'])}"
    note += f", {steps[0]['seconds'] / warm:.1f} times the median of those after it." if warm else "."
    legend = page.legend((("cold", "first step, cold"), ("warm", "the steps after it")))
    return page.section(
        "Decode steps", note, legend + columns(bars, label="Time of each decode step", unit=page.seconds, mark=mark)
    )


# ------------------------------------------------------------------ reads


def _io(report: Report) -> str:
    lines = []
    for row in report["io"]:
        useful = "" if row["useful"] == row["bytes"] else f"{page.share(row['useful'], row['bytes'])} asked for"
        mean = format_size(row["bytes"] / max(row["requests"], 1))
        lines.append(
            (escape(row["phase"]), escape(row["kind"]), f"{row['requests']:,}", format_size(row["bytes"]), mean, useful)
        )
    if not lines:
        return page.section("Reads", "Nothing was read from the drive.", "")
    parts = [_drive(report), page.table(("phase", "kind", "requests", "bytes", "mean size", ""), lines, left=(0, 1, 5))]
    sizes = sorted((int(size), count) for size, count in report["request_sizes"].items() if count)
    if sizes:
        bars = [
            Column(
                f"≤{format_size(size).replace('.00', '').replace('.0', '')}",
                [Segment(count, "io", f"up to {format_size(size)}: {count:,} requests")],
            )
            for size, count in sizes
        ]
        parts += [
            "<h3>requests by size</h3>",
            columns(bars, label="Number of requests by size", unit=page.count, height=180, labels_every=1),
        ]
    note = f"{format_size(report['wasted_bytes'])} were read ahead and never used." if report["wasted_bytes"] else ""
    return page.section("Reads", note, "".join(parts))


def _drive(report: Report) -> str:
    """What was reached beside what the drive gives."""
    drive, bars = report.get("drive"), []
    if drive:
        gives = drive["bytes_per_second"]
        how = f"requests of {format_size(drive['request_bytes'])}, {drive['depth']} at once"
        bars.append(
            Bar("the drive", [Segment(gives, "other", f"the drive: {page.rate(gives)} with {how}")], page.rate(gives))
        )
    for name in PHASES:
        reached = report[name]["read_bytes_per_second"]
        if reached:
            share = f" ({page.share(reached, drive['bytes_per_second'])})" if drive else ""
            bars.append(
                Bar(
                    name,
                    [Segment(reached, "io", f"{name}: {page.rate(reached)} while reading")],
                    page.rate(reached) + share,
                )
            )
    note = f"<p class='note'>The drive was measured in place, with {how}.</p>" if drive else ""
    return "<h3>bytes a second, while reading</h3>" + rows(bars, label="Read rates", thick=20) + note
