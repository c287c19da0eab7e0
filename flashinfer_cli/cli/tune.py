"""`genai-run tune`: instruction tuning of a small model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import Console
from .options import Json, ModelArgument, Quiet, option
from .running import INTERRUPTED, as_json
from .tables import Table
from .train import stopping


def tune(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make, or to go on in.")],
    data: Annotated[
        Path,
        option(None, "--data JSONL", "Rows with an instruction, an output, and perhaps an input."),
    ],
    freeze: Annotated[
        Literal["none", "router", "experts"], option(None, "--freeze", "What of a mixture of experts stays.")
    ] = "none",
    importance_weight: Annotated[float, option(None, "--importance-weight W", "Of the importance loss.", min=0)] = 0.0,
    load_weight: Annotated[
        float, option(None, "--load-weight W", "Of the load loss; it draws the gate's noise.", min=0)
    ] = 0.0,
    steps: Annotated[int, option(None, "--steps N", "Steps of the optimizer.", min=1)] = 1000,
    batch: Annotated[int, option(None, "--batch N", "Rows a step.", min=1)] = 8,
    learning_rate: Annotated[
        float, option(None, "--learning-rate X", "At its peak; then down a cosine.", min=1e-8)
    ] = 1e-3,
    seed: Annotated[int, option(None, "--seed N", "Of everything random.", min=0)] = 1,
    longest: Annotated[
        int | None,
        option(None, "--longest N", "Tokens of the longest row taken.", min=8, show_default="the model's context"),
    ] = None,
    held_out: Annotated[
        Path | None,
        option(None, "--held-out JSONL", "Rows to judge by instead.", show_default="one row in 32"),
    ] = None,
    note: Annotated[str | None, option(None, "--note TEXT", "For the card: the licence of the rows.")] = None,
    threads: Annotated[
        int | None,
        option(None, "--threads N", "Threads that train.", min=1, show_default="the cores this process may use"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
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
