"""Figure 4 of 2305.13245 at small scale: mean, first and random conversion of heads, before and after uptraining.

For each seed a model with 8 key/value heads is trained here and made into one with a single one; `--zoo NAME` takes a
model of the zoo instead, whose seeds are then only those of the uptraining. With `--kept FILE` runs that are lines of
that JSONL file are not repeated, and others become lines.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashinfer_cli import zoo
from flashinfer_cli.apps.heads import METHODS, convert_heads
from flashinfer_cli.apps.uptrain import original_tokens
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.load import load_decoder
from flashinfer_cli.training.loop import Corpus, Training
from flashinfer_cli.training.shape import Shape

from .figure import bars
from .machine import emit
from .small_runs import NOWHERE, SHAPE, Kept, arguments, corpus_of, judge, run, small, table

SEEDS = 3
SHARES = (0.0, 0.05, 0.10)  # of the tokens that the model was trained on
MHA = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3}
TOKENS = 1024  # of a step, as `small` has them


def main(argv: list[str]) -> None:
    """--zoo NAME, --kept FILE; --steps are of the training, or the most of each uptraining of a zoo model."""
    name, path = take(argv, "--zoo"), take(argv, "--kept")
    given = arguments(argv, __doc__ or "", steps=500)
    kept = Kept(Path(path) if path else None)
    source = None if name is None else zoo.path_of(name)
    shape = replace(SHAPE, **MHA) if source is None else load_decoder(source).shape
    corpus = corpus_of(replace(small({}, 1, given.seed), shape=shape), given.data)
    trained = given.steps if source is None else round(original_tokens(source) / TOKENS)
    wanted = [round(trained * share) for share in SHARES]
    if source is not None:
        wanted = [steps for steps in wanted if steps <= given.steps]
    keys = [f"after {steps} steps" for steps in wanted]
    rows: list[dict[str, Any]] = []
    for seed in range(given.seed, given.seed + SEEDS):
        done = [
            found for method in METHODS if (found := kept.find(method=method, seed=seed)) and set(keys) <= set(found)
        ]
        if len(done) == len(METHODS):
            rows += done
            continue
        with tempfile.TemporaryDirectory() as scratch:
            start = source
            if start is None:
                found = run(small(MHA, given.steps, seed), corpus)
                start = Path(scratch) / "trained"
                start.mkdir()
                write_folder(found.training.model, corpus.tokenizer, start)
            original = judged(start, corpus)
            for method in METHODS:
                convert_heads(start, Path(scratch) / method, 1, method=method, seed=seed)
                row: dict[str, Any] = {"method": method, "seed": seed, "original": original}
                for key, steps in zip(keys, wanted, strict=True):
                    row[key] = uptrained(Path(scratch) / method, shape, corpus, steps, seed)
                rows.append(kept.add(row))
                print(row, file=sys.stderr, flush=True)
    columns = tuple(rows[0])
    table(columns, [tuple(row.values()) for row in rows])
    means = [
        (f"{method}, {when}", sum(r[when] for r in rows if r["method"] == method) / SEEDS)
        for when in columns[3:]
        for method in METHODS
    ]
    title = f"{name or '8 heads trained here'}, {shape.num_key_value_heads} to 1 key/value heads: held-out nats a token"
    bars(given.figure, title, means, start=float(int(min(n for _, n in means))))
    emit("gqa", rows, seed=given.seed, model=name or "trained here", shares=SHARES, steps=wanted)


def take(argv: list[str], option: str) -> str | None:
    """The value of an option, which is removed; None where it is not given."""
    if option not in argv:
        return None
    at = argv.index(option)
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


def judged(folder: Path, corpus: Corpus) -> float:
    model = load_decoder(folder)
    return judge(Training(replace(small({}, 1, 1), shape=model.shape), corpus, NOWHERE, model))[0]


def uptrained(folder: Path, shape: Shape, corpus: Corpus, steps: int, seed: int) -> float:
    """Nats a token after `steps` more, in the order of `seed`."""
    recipe = replace(
        small({}, max(1, steps), seed, learning_rate=1e-3), shape=shape, warmup=max(1, min(20, steps // 5))
    )
    corpus = replace(corpus, train=replace(corpus.train, seed=seed + 1000))
    training = Training(recipe, corpus, NOWHERE, load_decoder(folder))
    for _ in range(steps):
        training.advance()
    return judge(training)[0]
