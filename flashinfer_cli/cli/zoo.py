"""`genai-run zoo`: the small trained models that come along."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import zoo as shipped
from ..config import format_size
from .console import Console
from .options import Json
from .running import as_json
from .tables import Table


def zoo(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this model's card.")] = None,
    json: Json = False,
) -> None:
    """List the small trained models that come along, or show the card of one.

    [dim]genai-run generate -m zoo:stories-moe -p "Once upon a time"[/dim]
    """
    console = Console()
    if name is not None:
        path = shipped.path_of(name)
        console.answer(as_json(shipped.card(name)) if json else (path / "README.md").read_text(encoding="utf-8"))
        return
    cards = {each: shipped.card(each) for each in shipped.names()}
    if json:
        console.answer(as_json(list(cards.values())))
        return
    rows = [
        (
            f"{shipped.PREFIX}{each}",
            card["about"],
            f"{card['parameters'] / 1e6:.1f} M",
            format_size(shipped.nbytes(each)),
            f"{card['bits_per_byte']:.3f}",
        )
        for each, card in cards.items()
    ]
    baseline = cards[shipped.DEFAULT]["bits_per_byte_4gram"]
    notes = (
        f"Bits per byte on stories held out of training; a 4-gram model has {baseline:.3f}.",
        f"{shipped.PREFIX}{shipped.DEFAULT} runs when no model is named. genai-run zoo NAME shows a card.",
    )
    columns = ("model", "what it is", "weights", "size", "bits per byte")
    console.show([Table("", columns, rows, notes, left=(0, 1))])
