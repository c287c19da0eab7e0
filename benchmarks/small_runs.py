"""What the figures about training share: small runs in memory, on one thread, the same each time for a seed."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flashinfer_cli import zoo
from flashinfer_cli.apps.train import read_tokenizer
from flashinfer_cli.training.loop import Corpus, Training, read_corpus
from flashinfer_cli.training.model import Aux
from flashinfer_cli.training.objective import held_out_nats, total_loss
from flashinfer_cli.training.recipes import Recipe
from flashinfer_cli.training.shape import Shape

SHAPE = Shape(vocab_size=512, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
NOWHERE = Path("/nonexistent")  # a run in memory has no folder; nothing is written
JUDGED = 8  # batches of held-out text
LATE = 50  # steps at the end of a run whose loads are counted


class Watched(Training):
    """A run that keeps how often experts were chosen, and the CV of their importance, in its last LATE steps."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        self.chosen: deque[torch.Tensor] = deque(maxlen=LATE)
        self.importance: deque[float] = deque(maxlen=LATE)
        super().__init__(recipe, corpus, NOWHERE)

    def _loss(self, l1: float) -> tuple[torch.Tensor, dict[str, float]]:
        loss, figures, aux = total_loss(self.model, self.corpus.train(self.step), self.recipe, l1)
        if aux.chosen:
            self.chosen.append(torch.stack(aux.chosen))
            self.importance.append(math.sqrt(figures["importance"]))
        return loss, figures


@dataclass(frozen=True)
class Found:
    """A run at its end: nats a held-out token (decided causally), seconds a step, what the layers left, the run."""

    nats: float
    seconds: float
    aux: Aux
    training: Watched

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def arguments(argv: list[str], about: str, **defaults: Any) -> argparse.Namespace:
    """--data, --steps, --seed and --figure, which all of them know."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers", description=about)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="text, documents apart by <|endoftext|>")
    parser.add_argument("--steps", type=int, default=defaults.get("steps", 500))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="where to write the SVG")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    return given


def small(shape: dict[str, Any], steps: int, seed: int, **changes: Any) -> Recipe:
    """A recipe of `steps` steps of 8 sequences of 128 tokens."""
    shaped = replace(SHAPE, **shape)
    changes = {"warmup": max(1, min(50, steps // 5)), "seed": seed, "dtype": "float32"} | changes
    return Recipe("small", "", shaped, tokens=steps * 1024, sequence=128, **changes)


def corpus_of(recipe: Recipe, texts: list[Path]) -> Corpus:
    """The text in the zoo's tokens for a model of its vocabulary, else in those of a tokenizer trained on it."""
    zoos = read_tokenizer(zoo.path_of(zoo.DEFAULT))
    return read_corpus(recipe, texts, zoos if zoos.get_vocab_size() == recipe.shape.vocab_size else None)


def judge(training: Training) -> tuple[float, Aux]:
    """(nats a token, what the layers left) on the first held-out batches."""
    windows = training.corpus.held_out[:JUDGED]
    nats, aux = held_out_nats(training.model, windows)
    return nats / sum(w[:, 1:].numel() for w in windows), aux


def run(recipe: Recipe, corpus: Corpus) -> Found:
    """Train from the recipe's seed to its last step, and judge."""
    training = Watched(recipe, corpus)
    times = []
    for _ in range(recipe.steps):
        begin = time.perf_counter()
        training.advance()
        times.append(time.perf_counter() - begin)
    nats, aux = judge(training)
    print(f"{recipe.steps} steps: {nats:.4f} nats a token", file=sys.stderr, flush=True)
    return Found(nats, sorted(times)[len(times) // 2], aux, training)


def balance(aux: Aux) -> tuple[float, float, float]:
    """(CV of importance, CV of load, busiest expert over the mean), the mean of layers, over all judged tokens."""
    chosen = torch.stack([c for c in aux.chosen if len(c)]).sum(0)
    cv = chosen.std(-1, correction=0) / chosen.mean(-1)
    importance = torch.stack([i for i in aux.importance if len(i)]).mean().sqrt()
    return float(importance), float(cv.mean()), float((chosen.max(-1).values / chosen.mean(-1)).mean())


def late_balance(training: Watched) -> tuple[float, float, float]:
    """As `balance`, of the last training steps: with the gate's noise, each batch's loads on their own."""
    loads = torch.stack(list(training.chosen))  # [steps, layers, experts]
    cv = (loads.std(-1, correction=0) / loads.mean(-1)).mean()
    most = (loads.max(-1).values / loads.mean(-1)).mean()
    return sum(training.importance) / len(training.importance), float(cv), float(most)


def table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row) + " |", flush=True)


class Kept:
    """Figures of runs that are done, one JSON object a line, so that a figure of hours can be made in parts and drawn
    again; without a file nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **what: Any) -> dict[str, Any] | None:
        """The row in which all of `what` stands."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in what.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row
