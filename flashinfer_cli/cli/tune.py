"""`genai-run tune`: instruction tuning of a small model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import Console
from .options import Json, ModelArgument, Quiet
from .running import INTERRUPTED, as_json
from .tables import Table
from .train import stopping


def tune(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make, or to go on in.")],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="JSONL", help="Rows with an instruction, an output, and perhaps an input."),
    ],
    freeze: Annotated[
        Literal["none", "router", "experts"], typer.Option("--freeze", help="What of a mixture of experts stays.")
    ] = "none",
    importance_weight: Annotated[
        float, typer.Option("--importance-weight", min=0, metavar="W", help="Of the importance loss.")
    ] = 0.0,
    load_weight: Annotated[
        float, typer.Option("--load-weight", min=0, metavar="W", help="Of the load loss; it draws the gate's noise.")
    ] = 0.0,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Steps of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Rows a step.")] = 8,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=1e-8, metavar="X", help="At its peak; then down a cosine.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of everything random.")] = 1,
    longest: Annotated[
        int | None,
        typer.Option(
            "--longest", min=8, metavar="N", show_default="the model's context", help="Tokens of the longest row taken."
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", metavar="JSONL", show_default="one row in 32", help="Rows to judge by instead."),
    ] = None,
    note: Annotated[
        str | None, typer.Option("--note", metavar="TEXT", help="For the card: the licence of the rows.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, metavar="N", show_default="the cores this process may use", help="Threads that train."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Teach a small model to answer: instruction tuning through its chat template, loss on the answers only.

    A model without a template gets one. Interrupted or killed, it goes on when the same command is given again.

    [dim]genai-run tune zoo:stories-moe my-chat --data instruct.jsonl --freeze router[/dim]
    """
    console = Console(quiet)
    from ..apps.tune import tune as run
    from ..checkpoint.hub import resolve

    def report(done: int, total: int, figures: dict[str, float]) -> None:
        console.progress(done, total, "tuning", f"loss {figures['loss']:.2f}" if "loss" in figures else "")

    with stopping() as stop:
        found = run(
            resolve(model), out, data, freeze=freeze, importance_weight=importance_weight, load_weight=load_weight,
            steps=steps, batch=batch, learning_rate=learning_rate, seed=seed, longest=longest, held_out=held_out,
            threads=threads, command=shlex.join(["genai-run", *sys.argv[1:]]), note=note,
            report=report, stop=lambda: bool(stop), say=console.note,
        )  # fmt: skip
    console.clear()
    if found is None:
        console.say(f"Stopped and saved in {out}. The same command goes on from there.")
        raise typer.Exit(INTERRUPTED)
    console.answer(as_json(found)) if json else console.show([_summary(found, out)])


def _summary(found: dict[str, Any], out: Path) -> Table:
    before, after = found["before"], found["after"]
    rows = [
        ("answers", f"{before['nats']:.3f}", f"{after['nats']:.3f}", "nats a token, held out"),
        ("stop token", f"{before['stop_probability']:.1%}", f"{after['stop_probability']:.1%}", "where answers end"),
    ]
    if "max_over_mean" in after:
        was, now = (", ".join(f"{m:.2f}" for m in each["max_over_mean"]) for each in (before, after))
        rows.append(("experts", was, now, "busiest over mean, by layer"))
    return Table(str(out), ("", "before", "after", ""), rows, left=(0, 3))
