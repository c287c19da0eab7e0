"""`genai-run convert-heads`: a checkpoint with fewer key/value heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..config import format_size
from ..errors import UsageError
from .console import Console
from .options import Json, ModelArgument, Quiet, Revision, option
from .running import INTERRUPTED, as_json
from .tables import Table
from .train import stopping

HEADS, UPTRAINING = "Heads", "Uptraining"


def convert_heads(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    kv_heads: Annotated[
        int,
        option(HEADS, "--kv-heads N", "Key/value heads to leave; 1 is multi-query attention.", min=1),
    ],
    method: Annotated[
        Literal["mean", "first", "random"],
        option(HEADS, "--method", "What becomes of the heads of a group."),
    ] = "mean",
    uptrain: Annotated[bool, option(UPTRAINING, "--uptrain", "Then go on training (small models only).")] = False,
    data: Annotated[
        list[Path] | None,
        option(UPTRAINING, "--data TEXT...", "UTF-8 text files to train on."),
    ] = None,
    share: Annotated[
        str,
        option(UPTRAINING, "--share P%", "Of the original training's tokens."),
    ] = "5%",
    tokens: Annotated[
        int | None,
        option(
            UPTRAINING,
            "--tokens N",
            "Tokens to train on, where the original number is not known.",
            min=1,
            show_default="the share",
        ),
    ] = None,
    learning_rate: Annotated[float, option(UPTRAINING, "--learning-rate X", "At its peak.", min=1e-8)] = 1e-3,
    threads: Annotated[
        int | None,
        option(UPTRAINING, "--threads N", "Threads that train.", min=1, show_default="the cores this process may use"),
    ] = None,
    seed: Annotated[int, option(None, "--seed N", "Of everything random.", min=0)] = 1,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a checkpoint with fewer key/value heads: grouped-query attention from multi-head.

    The heads of each contiguous group are averaged; keys and values then take N heads' memory. Some more training
    mends what that breaks: --uptrain does it here for models that are small enough.

    [dim]genai-run convert-heads my-model my-model-mqa --kv-heads 1 --uptrain --data stories.txt[/dim]
    """
    console = Console(quiet)
    if not uptrain and (data or tokens):
        raise UsageError("--data and --tokens are for uptraining.", "Add --uptrain.")
    going_on = uptrain and (out / ".training").is_dir()
    wanted = _tokens(model, data, share, tokens, revision) if uptrain else 0
    found: dict[str, Any] = {}
    if not going_on:
        from ..apps.heads import convert_heads as run

        found = run(
            model, out, kv_heads, method=method, seed=seed, revision=revision,
            progress=lambda done, total: console.progress(done, total, "converting"),
        )  # fmt: skip
        console.clear()
    if uptrain:
        found["uptraining"] = _uptrain(console, out, data or [], wanted, seed, learning_rate, threads)
    console.answer(as_json(found)) if json else console.show([_summary(found, out)])


def _tokens(model: str, data: list[Path] | None, share: str, tokens: int | None, revision: str | None) -> int:
    """How many tokens to uptrain on; checked before anything is written."""
    if not data:
        raise UsageError("--uptrain needs text.", "Give --data TEXT.")
    from ..apps.uptrain import original_tokens
    from ..checkpoint.hub import resolve
    from ..training.data import read_documents, split
    from ..training.load import load_decoder

    split(read_documents(data))
    folder = resolve(model, revision=revision)
    load_decoder(folder)
    if tokens is not None:
        return tokens
    try:
        part = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise UsageError(f"'{share}' is no share of a training.", "Write 5%.")
    return max(1, round(original_tokens(folder) * part))


def _uptrain(
    console: Console, out: Path, data: list[Path], tokens: int, seed: int, rate: float, threads: int | None
) -> dict[str, Any]:
    from ..apps.uptrain import uptrain

    def report(done: int, total: int, figures: dict[str, float]) -> None:
        console.progress(done, total, "uptraining", f"loss {figures['loss']:.2f}" if "loss" in figures else "")

    with stopping() as stop:
        found = uptrain(
            out, data, tokens, seed=seed, learning_rate=rate, threads=threads, report=report, stop=lambda: bool(stop)
        )
    console.clear()
    if found is None:
        console.say(f"Stopped and saved in {out}. The same command goes on from there.")
        raise typer.Exit(INTERRUPTED)
    return found


def _summary(found: dict[str, Any], out: Path) -> Table:
    rows = []
    if "kv_heads" in found:
        before, after = (format_size(found[key]) for key in ("kv_bytes_per_token_before", "kv_bytes_per_token"))
        rows.append(("key/value heads", f"{found['kv_heads_before']} -> {found['kv_heads']}, by {found['method']}"))
        rows.append(("keys and values", f"{before} -> {after} a token"))
    if "uptraining" in found:
        more = found["uptraining"]
        rows.append(
            (
                "uptrained",
                f"{more['tokens']:,} tokens: {more['nats_before']:.3f} -> {more['nats_after']:.3f} nats a token",
            )
        )
    return Table(str(out), ("", ""), rows, left=(0, 1))
