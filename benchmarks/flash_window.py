"""How far windowing goes (2312.11514, 3.1): new neurons a token against the window, as fired and as predicted.

    python -m benchmarks.papers flash-window BUNDLE [--tokens N] [--text FILE | --random]

BUNDLE is calibrated. Consecutive tokens go through the model densely, a layer at a time; nothing is skipped, so what
fires is what the dense model fires. A window of k holds the union of what k tokens asked for: `slots` is its mean size,
as a share of all neurons, `new` what the next token asks for and is not there, as a share of what it asks for. Below it
the same slots, dealt to the layers as runs do it, kept by recency instead (policy `recent`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from flashinfer_cli.apps.calibrate import gate_rows
from flashinfer_cli.apps.layerwise import layer_by_layer
from flashinfer_cli.bundles.sparsity import PREDICTORS_FILE, read_sparsity
from flashinfer_cli.cache.window import deal, make_policy
from flashinfer_cli.cli.console import Console
from flashinfer_cli.cli.tables import Table
from flashinfer_cli.config import RunConfig
from flashinfer_cli.engine import Engine
from flashinfer_cli.kernels.activations import ACTIVATIONS
from flashinfer_cli.layers.demand import LowRankPredictor
from flashinfer_cli.layers.ffn import RecordFfn
from flashinfer_cli.models.decoder import Block
from flashinfer_cli.models.open import open_model
from flashinfer_cli.models.predictors import load_predictors

from .flash_ladder import token_ids
from .machine import emit

WINDOWS = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LONGEST = 512  # tokens of a sequence
SETTLE = 128  # tokens of a sequence that are not counted: no window is full before


def layers_of(bundle: Path, ids: list[int], memory: str | None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(layer, what fires, what is predicted), the latter two bool [tokens, d_ff], of one sequence."""
    run = RunConfig(memory=memory, exact=True, stream="always", context=len(ids), prefill_chunk=len(ids))
    with Engine(open_model(bundle), run) as engine, torch.inference_mode():

        def gate_of(index: int, block: Block) -> tuple[torch.Tensor, torch.Tensor | None] | None:
            return gate_rows(block.ffn, engine) if isinstance(block.ffn, RecordFfn) else None

        for index, _, inputs, rows in layer_by_layer(engine, [ids], gate_of, None):
            if rows is None:
                continue
            gate, bias = rows
            z = inputs @ gate.T if bias is None else inputs @ gate.T + bias
            predictor = load_predictors(bundle / PREDICTORS_FILE, [index], engine.kernels, engine.device)[index]
            assert isinstance(predictor, LowRankPredictor)
            named = predictor.scores(inputs) > 0
            yield index, (ACTIVATIONS[engine.config.hidden_act](z) != 0).numpy(), named.numpy()


def window(asked: np.ndarray, k: int) -> tuple[int, int]:
    """asked bool [tokens, n] -> over the tokens from SETTLE on, those new to the last k tokens, and the size of the
    window before each, both summed."""
    new = size = 0
    for token in range(max(SETTLE, k), len(asked)):
        held = asked[token - k : token].any(0)
        new += int((asked[token] & ~held).sum())
        size += int(held.sum())
    return new, size


def recent(asked: dict[int, np.ndarray], slots: int) -> int:
    """Misses from SETTLE on, of so many slots in all, dealt by what 8 tokens need and kept by recency."""
    counts = {layer: each.shape[1] for layer, each in asked.items()}
    wants = {
        layer: float(np.mean([each[t : t + 8].any(0).mean() for t in range(0, len(each), 8)]))
        for layer, each in asked.items()
    }
    room, missed = deal(slots, counts, dict.fromkeys(counts, 1), wants), 0
    for layer, each in asked.items():
        policy = make_policy("recent", counts[layer], room[layer], 0)
        for token, row in enumerate(each):
            policy.demand(np.flatnonzero(row), counted=token >= SETTLE)
        missed += policy.misses
    return missed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="calibrated")
    parser.add_argument("--tokens", type=int, default=LONGEST, help=f"at most {LONGEST}")
    parser.add_argument("--text", type=Path, help="default: held-out stories")
    parser.add_argument("--random", action="store_true", help="random ids instead of a text")
    parser.add_argument("--memory", help="bound on the memory of the process")
    given = parser.parse_args(arguments)
    if read_sparsity(given.bundle) is None:
        raise SystemExit(f"{given.bundle} is not calibrated.")
    ids = token_ids(given, given.bundle, min(given.tokens, LONGEST))
    found = list(layers_of(given.bundle, ids, given.memory))
    fired = {layer: each for layer, each, _ in found}
    named = {layer: each for layer, _, each in found}
    everything, tokens = sum(each.shape[1] for each in fired.values()), len(ids) - SETTLE
    active, predicted = (sum(int(each[SETTLE:].sum()) for each in asked.values()) for asked in (fired, named))
    hits = sum(int((fired[layer] & named[layer])[SETTLE:].sum()) for layer in fired)
    rows = []
    for k in WINDOWS:
        if k > SETTLE:
            continue
        row: dict[str, float] = {"window": k}
        for what, asked, total in (("fired", fired, active), ("predicted", named, predicted)):
            new, size = (sum(part) for part in zip(*(window(each, k) for each in asked.values()), strict=True))
            row |= {
                f"{what}_new": new / total,
                f"{what}_new_of_active": new / active,
                f"{what}_slots": size / tokens / everything,
                f"{what}_recent": recent(asked, size // tokens) / total,
            }
        rows.append(row)
    shares = (
        "fired_slots", "fired_new", "fired_recent",
        "predicted_slots", "predicted_new", "predicted_recent", "predicted_new_of_active",
    )  # fmt: skip
    cells = [(f"{row['window']:.0f}", *(f"{row[share]:.1%}" for share in shares)) for row in rows]
    columns = (
        "window", "slots, fired", "new", "by recency", "slots, predicted", "new", "by recency", "new of the active",
    )  # fmt: skip
    notes = (
        f"{active / tokens:,.0f} of {everything:,} neurons fire a token ({active / tokens / everything:.1%}), "
        f"{predicted / tokens:,.0f} are predicted ({predicted / active:.2f} times), recall {hits / active:.1%}.",
    )
    Console().show([Table(f"{given.bundle.name}, {tokens} tokens behind {SETTLE}", columns, cells, notes)])
    emit("flash-window", rows, model=given.bundle.name, active=active / tokens, predicted=predicted / tokens)


if __name__ == "__main__":
    main()
