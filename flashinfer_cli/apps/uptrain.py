"""Uptraining (2305.13245, section 2.1): a share of the original training more, for heads that were just pooled."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..device import cores
from ..errors import StorageError, UsageError
from ..training.export import write_weights
from ..training.load import load_decoder
from ..training.loop import Report, Training, read_corpus
from ..training.objective import held_out_nats
from ..training.recipes import Recipe
from .train import read_tokenizer


def original_tokens(source: Path) -> int:
    """How many tokens a model of ours was trained on, from its card. Raises UsageError where there is none."""
    card = source / "card.json"
    try:
        return int(json.loads(card.read_text(encoding="utf-8"))["recipe"]["tokens"])
    except (OSError, KeyError, ValueError, TypeError):
        raise UsageError(
            f"How many tokens {source} was trained on is not known: it has no card.json of `train`.",
            "Give --tokens N instead of a share.",
        ) from None


def uptrain(
    folder: Path,
    texts: Sequence[Path],
    tokens: int,
    *,
    seed: int = 1,
    learning_rate: float = 1e-3,
    batch: int = 8,
    sequence: int = 512,
    threads: int | None = None,
    report: Report = lambda done, total, figures: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train the model in `folder` on `tokens` tokens more, in place; returns held-out nats a token before and after.

    None when `stop` became true first: the same call goes on from there. The weights in the folder change last.
    """
    torch.set_num_threads(threads or cores())
    torch.use_deterministic_algorithms(True)
    try:
        model = load_decoder(folder)
        length = min(sequence, model.shape.max_position_embeddings)
        steps = max(1, round(tokens / (batch * length)))
        recipe = Recipe(
            "uptrain", "", model.shape, tokens=tokens, batch=batch, sequence=length, learning_rate=learning_rate,
            warmup=max(1, min(20, steps // 5)), seed=seed,
        )  # fmt: skip
        corpus = read_corpus(replace(recipe), texts, read_tokenizer(folder))
        counted = sum(w[:, 1:].numel() for w in corpus.held_out)
        before = held_out_nats(model, corpus.held_out)[0] / counted
        training = Training(recipe, corpus, folder, load_decoder(folder))
        if not training.run(report, stop=stop):
            return None
        after = held_out_nats(training.model, corpus.held_out)[0] / counted
        write_weights(training.model, folder)
        training.discard_state()
        return {"tokens": tokens, "steps": recipe.steps, "nats_before": before, "nats_after": after}
    except OSError as error:
        raise StorageError(f"Cannot write {folder}: {error.strerror or error}.") from None
    finally:
        torch.use_deterministic_algorithms(False)
