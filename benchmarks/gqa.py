"""Figure 4 of 2305.13245 on a model of the zoo: mean, first and random conversion, before and after uptraining."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashinfer_cli import zoo
from flashinfer_cli.apps.heads import METHODS, convert_heads
from flashinfer_cli.apps.uptrain import original_tokens
from flashinfer_cli.training.load import load_decoder
from flashinfer_cli.training.loop import Training

from .figure import bars
from .machine import emit
from .small_runs import NOWHERE, arguments, corpus_of, judge, small, table

MODEL, KV_HEADS, SEEDS = "stories-draft", 1, 3
SHARES = (0.05, 0.10)  # of the tokens that the model was trained on
ALL = 10**9  # --steps: the whole of a share


def main(argv: list[str]) -> None:
    """--steps N stops each uptraining after N steps of 1,024 tokens, and then the second share is left out."""
    given = arguments(argv, __doc__ or "", steps=ALL)
    source = zoo.path_of(MODEL)
    shape = load_decoder(source).shape
    corpus = corpus_of(replace(small({}, 1, given.seed), shape=shape), given.data)
    wanted = [min(given.steps, round(original_tokens(source) * share / 1024)) for share in SHARES]
    wanted = wanted[:1] if given.steps <= wanted[0] else wanted
    rows: list[dict[str, Any]] = []
    for seed in range(given.seed, given.seed + SEEDS):
        for method in METHODS:
            with tempfile.TemporaryDirectory() as scratch:
                convert_heads(source, Path(scratch) / "out", KV_HEADS, method=method, seed=seed)
                row: dict[str, Any] = {"method": method, "seed": seed}
                for steps in (0, *wanted):
                    recipe = replace(
                        small({}, max(1, steps), seed, learning_rate=1e-3), shape=shape, warmup=max(1, min(20, steps))
                    )
                    batches = replace(corpus.train, seed=seed)
                    training = Training(
                        recipe, replace(corpus, train=batches), NOWHERE, load_decoder(Path(scratch) / "out")
                    )
                    for _ in range(steps):
                        training.advance()
                    row[f"after {steps} steps"] = judge(training)[0]
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    columns = tuple(rows[0])
    table(columns, [tuple(row.values()) for row in rows])
    means = [
        (f"{method}, {when}", sum(r[when] for r in rows if r["method"] == method) / SEEDS)
        for when in columns[2:]
        for method in METHODS
    ]
    bars(given.figure, f"{MODEL}, 2 to 1 key/value heads: held-out nats a token", means)
    emit("gqa", rows, seed=given.seed, shares=SHARES, steps=wanted)
