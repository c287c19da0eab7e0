"""The command `replay`: policies over a recorded trace, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import EXPERT_POLICIES, NEURON_POLICIES, format_size
from .console import Console
from .options import MEMORY, OUTPUT, Json, Quiet, option
from .running import as_json, check_writable, parse_share, write_file
from .tables import Table

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

    Shows how often each policy would find what was asked for, and what it would read a token, beside chance and beside
    Belady's optimum, which knows the future.
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
    hits = [
        (
            *size,
            *(f"{point['policies'][name]['hit_ratio']:.1%}" for name in policies),
            f"{point['belady_by_layer']['hit_ratio']:.1%}",
            f"{point['belady']['hit_ratio']:.1%}",
        )
        for size, point in zip(sizes, points, strict=True)
    ]
    reads = [
        (
            *size,
            *(format_size(point["policies"][name]["bytes_per_token"]) for name in policies),
            format_size(point["belady_by_layer"]["bytes_per_token"]),
            format_size(point["belady"]["bytes_per_token"]),
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
        Table(f"Hit ratio of {phase}", columns, hits, notes=(note,)),
        Table(f"Read a token of {phase}", columns, reads),
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
