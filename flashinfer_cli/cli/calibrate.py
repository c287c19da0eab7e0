"""`genai-run calibrate`: teach a bundle which of its neurons a token needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import zoo
from ..config import RunConfig, format_size
from .console import Console
from .options import PROMPT, Json, Quiet
from .running import as_json
from .tables import Table

if TYPE_CHECKING:
    from ..bundles.sparsity import Sparsity


def calibrate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle of a ReLU model.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", rich_help_panel=PROMPT, help="Text to learn from.",
            show_default="the stories that come along",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1000, metavar="N", rich_help_panel=PROMPT, help="How much of the text.")
    ] = 10_000,
    recall: Annotated[
        float,
        typer.Option(
            "--recall", min=0.5, max=0.9999, metavar="P", rich_help_panel=PROMPT,
            help="Share of the neurons that fire which each predictor must name.",
        ),
    ] = 0.98,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Bound on the memory of the whole process.", show_default="auto"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Learn which neurons a token needs, so that only they are read.

    For models whose activation is ReLU or its square. The model passes once, a layer at a time; predictors and what was
    measured are written into the bundle, which then runs sparse (--exact runs it whole). Interrupted, it goes on when
    started again.
    """
    console = Console(quiet)
    from ..apps.calibrate import calibrate as learn
    from ..apps.calibrate import read_text

    given = read_text(text if text is not None else zoo.HELD_OUT)
    found = learn(
        bundle, given, replace(RunConfig(), memory=memory), tokens=tokens, recall=recall, progress=console.progress
    )
    console.clear()
    if json:
        from dataclasses import asdict

        console.answer(as_json(asdict(found)))
    else:
        console.show([table(found)])


def table(found: Sparsity) -> Table:
    """A row a layer, and what the model pays."""
    rows: list[tuple[str, ...]] = []
    for layer in found.layers:
        over = layer.predicted / layer.density if layer.density else 0.0
        rows.append(
            (
                str(layer.layer), f"{1 - layer.density:.1%}", f"{layer.recall:.1%}", f"{layer.precision:.1%}",
                f"{layer.predicted:.1%}", f"{over:.1f}x", f"{layer.new.get('4', 0.0):.1%}", str(layer.rank),
                format_size(layer.bytes),
            )
        )  # fmt: skip
    quality = found.quality
    notes = [
        f"Perplexity {quality['perplexity']:.3f}, dense {quality['dense_perplexity']:.3f} "
        f"({found.perplexity_increase:+.2%}); same first choice for {quality['top1_agreement']:.1%} of tokens."
    ]
    thin = [str(layer.layer) for layer in found.layers if layer.recall < 0.95]
    if thin:
        notes.append(f"Thin spots, below 95% recall: layer {', '.join(thin)}.")
    columns = ("layer", "silent", "recall", "precision", "predicted", "over", "new in 4", "rank", "bytes")
    return Table(f"Calibrated on {found.tokens:,} tokens", columns, rows, tuple(notes))
