"""The command `replay`: policies over a recorded trace, without the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..apps.recommended import in_rate, recommended_words
from ..config import EXPERT_POLICIES, NEURON_POLICIES, format_size
from .console import Console
from .options import MEMORY, OUTPUT, Json, Quiet, option
from .running import as_json, check_writable, parse_share, write_file
from .tables import Table, facts

MOST_GUESSES = 8  # columns of the table of recalls


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace: profile --trace FILE makes one.")],
    policy: Annotated[
        list[str] | None,
        option(
            MEMORY,
            "--policy NAME",
            f"For experts {', '.join(EXPERT_POLICIES)}; for neurons {', '.join(NEURON_POLICIES)}. May be repeated.",
            show_default="all",
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        option(
            MEMORY,
            "--at SHARE",
            "Cache size as a share of all records, such as 25%; may be repeated.",
            show_default="several",
        ),
    ] = None,
    json: Json = False,
    html: Annotated[
        Path | None,
        option(OUTPUT, "--html FILE", "Write one self-contained page of charts."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Try cache policies and sizes on a recorded trace, without the model.

    Shows how often each policy would find what was asked for, what it would read a token, and how many tokens a second
    to expect, beside chance and beside Belady's optimum, which knows the future; and the memory to recommend.
    """
    console = Console(quiet)
    check_writable(html)
    shares = [parse_share(text, "--at") for text in at or ()]
    from ..apps.replay import replay as run

    found = run(
        file,
        policies=tuple(dict.fromkeys(policy or ())),
        shares=shares,
        progress=lambda done, total: console.progress(done, total, "replaying"),
    )
    console.clear()
    if html is not None:
        from ..apps.replay_page import render

        write_file(html, render(found))
    if json:
        console.answer(as_json(found))
    else:
        console.show(replay_tables(found))


def replay_tables(found: Mapping[str, Any]) -> list[Table]:
    """What `apps.replay` found, for people."""
    points = found["points"]
    policies = list(points[0]["policies"])
    sizes = [(f"{point['share']:.1%}", f"{point['slots']:,}", format_size(point["bytes"])) for point in points]

    def figures(name: str, write: Callable[[float], str]) -> list[tuple[str, ...]]:
        return [
            (
                *size,
                *(write(point["policies"][policy][name]) for policy in policies),
                write(point["belady_by_layer"][name]),
                write(point["belady"][name]),
            )
            for size, point in zip(sizes, points, strict=True)
        ]

    gaps = [
        (size[0], point["best"], *(f"{point['gap'][key]:.1%}" for key in ("chance", "policy", "order", "room", "cold")))
        for size, point in zip(sizes, points, strict=True)
    ]
    kind, phase = found["kind"], found["phase"]
    note = (
        f"{found['tokens']:,} tokens of {phase} asked for {found['demanded']:,} {kind} in {found['layers']} layers. "
        "Chance is the share that is cached."
    )
    columns = ("chance", kind, "size", *policies, "Belady by layer", "Belady")
    parts = ("chance", "best policy", "by chance", "+ by policy", "+ by Belady", "no room", "first uses")
    tables = [
        *_as_it_ran(found),
        Table(f"Hit ratio of {phase}", columns, figures("hit_ratio", lambda ratio: f"{ratio:.1%}"), notes=(note,)),
        Table(f"Read a token of {phase}", columns, figures("bytes_per_token", format_size)),
        *_rates(found, columns, figures("tokens_per_second", in_rate) if found["recommended"] else []),
        Table("What is asked for, by who finds it", parts, gaps, left=(0, 1)),
    ]
    if found["recall"]:
        rows = []
        for each in found["recall"]:
            shown = each["recall"][:MOST_GUESSES]
            rows.append((str(each["ahead"]), *(f"{value:.1%}" for value in shown)))
        longest = max(found["recall"], key=lambda each: len(each["chance"]))
        rows.append(("chance", *(f"{value:.1%}" for value in longest["chance"][:MOST_GUESSES])))
        width = max(len(row) for row in rows)
        padded = [(*row, *("" for _ in range(width - len(row)))) for row in rows]
        header = ("layers ahead", *(f"{number} guessed" for number in range(1, width)))
        tables.append(Table("Needed experts that were guessed", header, padded))
    return tables


def _as_it_ran(found: Mapping[str, Any]) -> list[Table]:
    """The policy and room of the run that was recorded; none where the trace does not tell them."""
    ran = found["as_it_ran"]
    if ran is None:
        return []
    asked = ran["hits"] + ran["misses"]
    pairs = {
        "policy": f"{ran['policy']}, {ran['slots']:,} of {found['records']:,} {found['kind']} have slots",
        "hits": f"{ran['hits']:,} of {asked:,} ({ran['hit_ratio']:.1%})",
        "bytes a token": f"{format_size(ran['bytes_per_token'])} missed",
    }
    if ran["counted"] is not None:
        counted = ran["counted"]
        same = (counted["hits"], counted["misses"]) == (ran["hits"], ran["misses"])
        pairs["hits that the run counted"] = (
            "the same" if same else f"{counted['hits']:,}, {counted['misses']:,} misses"
        )
        pairs["measured"] = f"{in_rate(ran['tokens_per_second'])} tok/s, without the writing of the trace"
    return [facts("As it ran", pairs)]


def _rates(found: Mapping[str, Any], columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[Table]:
    """Expected tokens a second and the memory to recommend; where the trace does not tell, the line that says so."""
    said = recommended_words(found)
    if not rows:
        return [facts("Expected tok/s", {"not known": said})]
    budgets = ["–" if point["memory"] is None else format_size(point["memory"]) for point in found["points"]]
    with_budgets = [(*row[:3], budget, *row[3:]) for row, budget in zip(rows, budgets, strict=True)]
    header = (*columns[:3], "--memory", *columns[3:])
    return [Table(f"Expected tok/s of {found['phase']}", header, with_budgets, notes=(said,))]
