"""`genai-run train`: a small model of one of our recipes, from text files."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UsageError
from .console import Console
from .options import OUTPUT, Json, Quiet, option
from .running import INTERRUPTED, as_json
from .tables import Table

if TYPE_CHECKING:
    from ..training.recipes import Recipe

TRAINING, SHAPE = "Training", "Structure"


def _option(help_: str, panel: str, metavar: str | None = None, **more: Any) -> Any:
    return option(panel, metavar or "", help_, show_default="the recipe's", **more)


def train(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="stories-relu, -moe, -mod, -draft, -moe-lstm or -moe-lstm-2."),
    ],
    data: Annotated[
        list[Path],
        option(TRAINING, "--data TEXT...", "UTF-8 text files, documents separated by <|endoftext|>."),
    ],
    out: Annotated[Path, option(OUTPUT, "--out DIR", "The folder to make, or to go on in.")],
    tokens: Annotated[int | None, _option("Tokens seen in all.", TRAINING, "N", min=1)] = None,
    batch: Annotated[int | None, _option("Sequences a step.", TRAINING, "N", min=1)] = None,
    sequence: Annotated[int | None, _option("Tokens of a sequence.", TRAINING, "N", min=8, max=512)] = None,
    learning_rate: Annotated[float | None, _option("At its peak.", TRAINING, "X", min=1e-8)] = None,
    seed: Annotated[int | None, _option("Of everything random.", TRAINING, "N", min=0)] = None,
    threads: Annotated[
        int | None,
        option(
            TRAINING,
            "--threads N",
            "Threads that compute; a run repeats to the bit on as many.",
            min=1,
            show_default="the cores this process may use",
        ),
    ] = None,
    save_every: Annotated[int, option(TRAINING, "--save-every STEPS", "How often to save.", min=1)] = 100,
    tokenizer: Annotated[
        Path | None,
        option(
            TRAINING,
            "--tokenizer PATH",
            "A tokenizer.json or a model's folder.",
            show_default="one is trained on the text",
        ),
    ] = None,
    note: Annotated[
        str | None,
        option(TRAINING, "--note TEXT", "For the card: the licence of the text."),
    ] = None,
    sparsity: Annotated[
        float | None, _option("Share of FFN neurons to silence; 0 leaves them.", SHAPE, "P", min=0, max=0.999)
    ] = None,
    experts: Annotated[int | None, _option("Experts a layer; 0 is dense.", SHAPE, "E", min=0)] = None,
    experts_per_token: Annotated[int | None, _option("Experts a token uses.", SHAPE, "K", min=1)] = None,
    expert_size: Annotated[int | None, _option("Neurons of an expert.", SHAPE, "N", min=1)] = None,
    noop_experts: Annotated[
        int | None, _option("Choices that compute nothing (integrated MoDE).", SHAPE, "N", min=0)
    ] = None,
    importance_weight: Annotated[float | None, _option("Of the importance loss.", SHAPE, "W", min=0)] = None,
    load_weight: Annotated[float | None, _option("Of the load loss.", SHAPE, "W", min=0)] = None,
    mod_capacity: Annotated[
        float | None, _option("Share of the tokens that a skippable block computes; 0: all.", SHAPE, "P", min=0, max=1)
    ] = None,
    mod_interval: Annotated[int | None, _option("Every how many blocks one is skippable.", SHAPE, "N", min=1)] = None,
    mod_decoding: Annotated[Literal["router", "predictor"] | None, _option("Who decides at decoding.", SHAPE)] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one of the small models that come along, or a variation of it.

    Needs no card: hours on a laptop. Interrupted or killed, it goes on when the same command is given again, to the
    same losses. --experts with stories-mod makes a staged MoDE; --noop-experts with --mod-capacity 0 an integrated one.

    [dim]genai-run train stories-relu --data stories.txt tales.txt --out my-model[/dim]
    """
    console = Console(quiet)
    from ..training.recipes import recipe as named

    given = {
        "tokens": tokens, "batch": batch, "sequence": sequence, "learning_rate": learning_rate, "seed": seed,
        "sparsity": sparsity, "importance_weight": importance_weight, "load_weight": load_weight,
        "num_experts": experts, "num_experts_per_tok": experts_per_token, "moe_intermediate_size": expert_size,
        "num_noop_experts": noop_experts, "mod_capacity": mod_capacity, "mod_interval": mod_interval,
        "mod_decoding": mod_decoding,
    }  # fmt: skip
    chosen = changed(named(recipe), {key: value for key, value in given.items() if value is not None})
    from ..apps.train import train as run

    def report(done: int, total: int, figures: dict[str, float]) -> None:
        names = {"loss": "loss {:.2f}", "sparsity": "{:.0%} silent", "router_agreement": "{:.0%} agree"}
        said = ", ".join(words.format(figures[key]) for key, words in names.items() if key in figures)
        console.progress(done, total, f"training {chosen.name}", said)

    with stopping() as stop:
        card = run(
            chosen, data, out, command=shlex.join(["genai-run", *sys.argv[1:]]), tokenizer=tokenizer, note=note,
            threads=threads, save_every=save_every, report=report, stop=lambda: bool(stop), say=console.note,
        )  # fmt: skip
    console.clear()
    if card is None:
        console.say(f"Stopped and saved in {out}. The same command goes on from there.")
        raise typer.Exit(INTERRUPTED)
    if json:
        console.answer(as_json(card))
    else:
        console.show([summary(card, out)])


def changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """The recipe with what the command line changes, in itself or in its shape."""
    own = {field.name for field in fields(recipe)}
    shape = {key: value for key, value in given.items() if key not in own}
    if shape.get("num_experts") and not (shape.get("moe_intermediate_size") or recipe.shape.moe_intermediate_size):
        # as much computed a token as the dense FFN had
        per_token = shape.get("num_experts_per_tok", recipe.shape.num_experts_per_tok)
        shape["moe_intermediate_size"] = max(8, recipe.shape.intermediate_size // per_token)
    if shape.get("num_noop_experts") and not (shape.get("num_experts") or recipe.shape.num_experts):
        raise UsageError("--noop-experts needs experts beside them.", "Give --experts too.")
    return replace(
        recipe,
        shape=replace(recipe.shape, **shape),
        **{key: value for key, value in given.items() if key in own},
    )


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that is not empty once Ctrl-C or a request to end has come; the second Ctrl-C ends at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(card: dict[str, Any], out: Path) -> Table:
    """What the card says, in a few lines."""
    rows = [
        ("held out", f"{card['bits_per_byte']:.3f} bits per byte; a 4-gram has {card['bits_per_byte_4gram']:.3f}"),
        ("trained", f"{card['steps']:,} steps, {card['hours']:.2f} h"),
    ]
    if "sparsity" in card:
        rows.append(("silent", ", ".join(f"{s:.1%}" for s in card["sparsity"]) + " by layer"))
    if "experts" in card:
        most = ", ".join(f"{m:.2f}" for m in card["experts"]["max_over_mean"])
        rows.append(("experts", f"busiest over mean by layer {most}"))
    if "depth" in card:
        for way in ("router", "predictor"):
            found = card["depth"][way]
            skipped = ", ".join(f"{s:.1%}" for s in found["skipped"])
            rows.append((way, f"{found['bits_per_byte']:.3f} bits per byte, skipped {skipped}"))
    return Table(str(out), ("", ""), rows, left=(0, 1))


def several(argv: Sequence[str]) -> list[str]:
    """`--data A B` as `--data A --data B`, which is what the parser knows."""
    found: list[str] = []
    inside = fresh = False
    for word in argv:
        if word == "--data":
            inside = fresh = True
            found.append(word)
            continue
        if word.startswith("-"):
            inside = False
        if inside and not fresh:
            found.append("--data")
        fresh = False
        found.append(word)
    return found
