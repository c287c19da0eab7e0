"""A recipe from text to a folder that the runtime reads: train, judge, write, sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..device import cores
from ..errors import StorageError, UsageError
from ..training.export import write_folder
from ..training.loop import SAVE_EVERY, Report, Training, read_corpus
from ..training.recipes import Recipe
from .card import describe, measure, samples, write_card
from .curve import curve

THIN = 10  # one step in so many stays in the finished folder's log


def train(
    recipe: Recipe,
    texts: Sequence[Path],
    out: Path,
    *,
    command: str,
    tokenizer: Path | None = None,
    note: str | None = None,
    threads: int | None = None,
    save_every: int = SAVE_EVERY,
    report: Report = lambda done, total, figures: None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Train `recipe` on `texts` into the folder `out`, or go on with what is there; returns its card.

    None when `stop` became true first: the same call goes on from there, to the same bits on as many threads. Raises
    UsageError for data that will not do, before anything is written, and for an `out` that is finished.
    """
    if (out / "model.safetensors").exists() and not (out / ".training").exists():
        raise UsageError(f"{out} holds a finished model.", "Give another --out.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file.", "Give a folder as --out.")
    torch.set_num_threads(threads or cores())
    torch.use_deterministic_algorithms(True)
    try:
        corpus = read_corpus(recipe, texts, None if tokenizer is None else read_tokenizer(tokenizer))
        training = Training(recipe, corpus, out)
        say(
            f"{recipe.name}: {sum(p.numel() for p in training.model.parameters()):,} parameters, {corpus.documents:,} "
            f"documents of {corpus.tokens:,} tokens, {len(corpus.held_out_documents)} held out"
            + (f"; going on from step {training.step:,}" if training.step else "")
        )
        if not training.run(report, stop=stop, save_every=save_every):
            return None
        say("judging it on the held-out text")
        card = describe(training, texts, command, note) | measure(training)
        write_folder(training.model, corpus.tokenizer, out)
        card["samples"] = samples(out)
        write_card(card, out)
        history = training.history()
        (out / "loss.svg").write_text(curve(history, f"{recipe.name}: loss in nats a token"), encoding="utf-8")
        kept = [row for row in history if row["step"] % THIN == 0 or "held_out" in row]
        training.log_file.write_text("".join(json.dumps(_short(row)) + "\n" for row in kept))
        training.discard_state()
        return card
    except OSError as error:
        raise StorageError(f"Cannot write {out}: {error.strerror or error}.") from None
    finally:
        torch.use_deterministic_algorithms(False)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, or the one in a model's folder."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"{file} is no tokenizer: {error}.", "Give a tokenizer.json or a model's folder.") from None
