"""The full account of a run as tables, for `--stats` and `profile`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from ..config import format_size
from ..report import PHASES, label
from .tables import Table, facts, rate, seconds, share

WORST_LAYERS = 3
SPANS = 8  # of a run's passes, in order: how many tokens were drafted over time


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything RunReport.to_dict() tells, for `--stats` and `profile`."""
    tables = [_run(report), _memory(report), _phases(report), _io(report)]
    if report["layers"]:
        tables.append(_layers(report))
    if report["steps"]:
        tables.append(_steps(report))
    if report.get("speculation"):
        tables.append(_speculation(report["speculation"]))
    if report.get("experts"):
        tables += _experts(report)
    return tables


def _run(report: Mapping[str, Any]) -> Table:
    model = report["model"]
    pairs = {
        "model": f"{model.get('name', '')} ({model.get('model_type', '')}, {model.get('kind', '')})",
        "parameters": f"{model.get('parameters') or 0:,}",
        "weights": f"{format_size(model.get('weight_bytes') or 0)} ({', '.join(model.get('formats') or {})})",
        "stays / streams": f"{format_size(report['resident_bytes'])} / {format_size(report['streamed_bytes'])}",
        "exactness": label(report["exactness"], report.get("quality")),
        "device": f"{report['device']}, {report['threads']} threads, {report['kernels']} kernels",
        "reads": str(report["direct_io"]),
    }
    if report["first_token_seconds"] is not None:
        pairs["first token after"] = seconds(report["first_token_seconds"])
    return facts("Run", pairs)


def _speculation(said: Mapping[str, Any]) -> Table:
    lengths = said["lengths"]
    step = max(1, -(-len(lengths) // SPANS))
    means = [sum(part) / len(part) for part in (lengths[i : i + step] for i in range(0, len(lengths), step))]
    without = sum(length == 0 for length in lengths)
    pairs = {
        "draft": str(said["draft"]),
        "tokens a pass": f"{said['tokens_per_pass']:.2f} ({said['expected_tokens_per_pass']:.2f} by the formula)",
        "acceptance": f"{said['alpha']:.0%} of the drafted tokens that were judged, {said['acceptance']:.0%} of all",
        "drafted a pass, over time": " ".join(f"{mean:.1f}" for mean in means),
        "passes without a draft": share(without, len(lengths)),
        "lent its memory": f"{said['times_lent']} times" if said["times_lent"] else "never",
        "speed against plain": f"{said['estimated_speedup']:.2f}, estimated",
    }
    if said["second_guesses"]:
        pairs["second guesses that stand"] = f"{said['rescued']}, checked at {said['second_guesses']} places of a run"
    return facts("Drafts", pairs)


def _memory(report: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    for part in report["plan"]:
        actual = "–" if part["actual"] is None else format_size(part["actual"])
        rows.append((part["part"], format_size(part["planned"]), actual, part["note"]))
    planned = sum(part["planned"] for part in report["plan"])
    rows.append(("all parts", format_size(planned), "", ""))
    of_budget = share(report["peak"], report["budget"])
    rows.append(("peak of the process", "", format_size(report["peak"]), f"{of_budget} of the budget"))
    rows.append(
        ("budget", format_size(report["budget"]), "", f"the least that works is {format_size(report['least'])}")
    )
    return Table("Memory", ("part", "planned", "actual", ""), rows, left=(0, 3))


def _phases(report: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    for name in PHASES:
        phase = report[name]
        if not phase["seconds"] and not phase["bytes_read"]:
            continue
        whole = phase["seconds"]
        rows.append((
            name,
            f"{phase['tokens']}",
            seconds(whole),
            f"{phase['tokens_per_second']:.2f}" if phase["tokens"] else "–",
            f"{seconds(phase['wait_seconds'])} {share(phase['wait_seconds'], whole):>4}",
            f"{seconds(phase['compute_seconds'])} {share(phase['compute_seconds'], whole):>4}",
            f"{seconds(phase['other_seconds'])} {share(phase['other_seconds'], whole):>4}",
            f"{phase['overlap']:.0%}" if phase["read_seconds"] else "–",
            "–" if phase["hit_ratio"] is None else f"{phase['hit_ratio']:.0%}",
        ))  # fmt: skip
    columns = (
        "phase",
        "tokens",
        "time",
        "tok/s",
        "waiting for I/O",
        "computing",
        "the rest",
        "reads hidden",
        "cache hits",
    )
    return Table("Time", columns, rows)


def _io(report: Mapping[str, Any]) -> Table:
    drive = report.get("drive")
    rows: list[tuple[str, ...]] = []
    for name in PHASES:
        kinds = [row for row in report["io"] if row["phase"] == name]
        if not kinds:
            continue
        phase = report[name]
        reached, mean = phase["read_bytes_per_second"], phase["bytes_read"] / max(phase["requests"], 1)
        per_token = format_size(phase["bytes_per_token"]) if phase["tokens"] else "–"
        speed = (rate(reached), share(reached, drive["bytes_per_second"]) if drive else "–")
        rows.append(
            (name, f"{phase['requests']:,}", format_size(phase["bytes_read"]), format_size(mean), per_token, *speed)
        )
        for row in kinds:
            size = format_size(row["bytes"] / max(row["requests"], 1))
            note = "" if row["useful"] == row["bytes"] else f"{share(row['useful'], row['bytes'])} asked for"
            rows.append((f"  {row['kind']}", f"{row['requests']:,}", format_size(row["bytes"]), size, note, "", ""))
    notes = []
    if drive:
        size, depth = format_size(drive["request_bytes"]), drive["depth"]
        notes.append(f"The drive, measured here: {rate(drive['bytes_per_second'])} at {size} a request, depth {depth}.")
    if report["wasted_bytes"]:
        notes.append(f"Read ahead and never used: {format_size(report['wasted_bytes'])}.")
    if not rows:
        notes.append("Nothing was read.")
    columns = ("reads", "requests", "bytes", "mean size", "a token", "while reading", "of the drive")
    return Table("I/O", columns if rows else ("",), rows, notes=tuple(notes))


def _layers(report: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    last = max(row["layer"] for row in report["layers"])
    inner = [row for row in report["layers"] if 0 <= row["layer"] < last] or list(report["layers"])
    for phase in ("prefill", "decode"):
        passes = max(report[phase]["passes"], 1)
        if not report[phase]["passes"]:
            continue
        for what, name in (("wait", "waiting"), ("compute", "computing")):
            each = {row["layer"]: row[f"{phase}_{what}"] / passes for row in inner}
            worst = sorted(each, key=lambda layer: each[layer], reverse=True)[:WORST_LAYERS]
            slow = ", ".join(f"{layer} ({seconds(each[layer])})" for layer in worst if each[layer])
            low, mean, high = min(each.values()), sum(each.values()) / len(each), max(each.values())
            rows.append((f"{phase}, {name}", seconds(low), seconds(mean), seconds(high), slow))
    notes = []
    for row in report["layers"]:
        if row not in inner:
            spent = [seconds(row[f"{phase}_wait"] + row[f"{phase}_compute"]) for phase in ("prefill", "decode")]
            notes.append(
                f"{'Embedding' if row['layer'] < 0 else 'Head'}, in all: prefill {spent[0]}, decode {spent[1]}."
            )
    return Table(
        "Layers, a pass", ("", "least", "mean", "most", "slowest layers"), rows, notes=tuple(notes), left=(0, 4)
    )


def _steps(report: Mapping[str, Any]) -> Table:
    first, warm = report["steps"][0], report["steps"][1:]
    rows = [
        ("first (cold)", seconds(first["seconds"]), seconds(first["wait_seconds"]), format_size(first["bytes_read"]))
    ]
    if warm:
        middle = [median(step[name] for step in warm) for name in ("seconds", "wait_seconds", "bytes_read")]
        worst = max(warm, key=lambda step: step["seconds"])
        rows.append((f"median of {len(warm)} warm", seconds(middle[0]), seconds(middle[1]), format_size(middle[2])))
        slowest = (
            "slowest warm",
            seconds(worst["seconds"]),
            seconds(worst["wait_seconds"]),
            format_size(worst["bytes_read"]),
        )
        rows.append(slowest)
    return Table("Decode steps", ("step", "time", "waiting", "read"), rows)


def _experts(report: Mapping[str, Any]) -> list[Table]:
    """Hits, guesses and use by layer; decode where there is any."""
    phase = "decode" if any(row["phase"] == "decode" for row in report["experts"]) else "prefill"
    lines = [row for row in report["experts"] if row["phase"] == phase]
    rows: list[tuple[str, ...]] = []
    for row in lines:
        used, uses = row["uses"], sum(row["uses"].values())
        top = sorted(used.values(), reverse=True)[: max(1, len(used) // 4)]
        rows.append((str(row["layer"]), *_expert_cells(row), f"{len(used)}", share(sum(top), uses)))
    whole = {key: sum(row[key] for row in lines) for key in ("hits", "misses", "guessed", "right", "wasted_bytes")}
    recalls = [row["recall"][ahead] for row in lines for ahead in row["recall"] if str(ahead) == "1"]
    whole["recall"] = {1: sum(recalls) / len(recalls)} if recalls else {}
    rows.append(("all", *_expert_cells(whole), "", ""))
    cache = report["expert_cache"]
    policy = " as ".join(dict.fromkeys((cache["policy"], cache["follows"])))
    notes = [
        f"{cache['slots']:,} of {cache['experts']:,} experts stay, by policy {policy}; "
        f"{cache['transit']} slots for those on their way; {format_size(cache['slot_bytes'])} each.",
        f"Reading ahead is {_verdict(cache['prefetch'])}.",
    ]
    degraded = sum(row.get("degraded", 0) for row in lines)
    if degraded:
        notes.append(f"{degraded:,} more came from small copies (--degrade {cache['degrade']:g}).")
    columns = ("layer", "asked for", "hits", "recall", "read ahead", "right", "wasted", "in use", "by the top quarter")
    return [Table(f"Experts, {phase}", columns, rows, notes=tuple(notes))]


def _expert_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    asked = row["hits"] + row["misses"]
    recall = next((value for ahead, value in row["recall"].items() if str(ahead) == "1"), None)
    return (
        f"{asked:,}",
        share(row["hits"], asked),
        "–" if recall is None else f"{recall:.0%}",
        f"{row['guessed']:,}",
        share(row["right"], row["guessed"]),
        format_size(row["wasted_bytes"]),
    )


def _verdict(prefetch: Mapping[str, Any]) -> str:
    """On or off, and what the trial measured."""
    said = str(prefetch["verdict"])
    if prefetch["seconds_with"] is not None and prefetch["seconds_without"] is not None:
        said += (
            f" ({seconds(prefetch['seconds_with'])} a token with it, {seconds(prefetch['seconds_without'])} without)"
        )
    return said
