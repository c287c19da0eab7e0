"""KV bytes and decoding time a token against key/value heads and context (1911.02150, table 3; 2305.13245, fig. 6)."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps.train import read_tokenizer
from flashinfer_cli.config import SamplingParams
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder

from .figure import bars
from .machine import emit
from .small_runs import SHAPE, table

HEADS = 16
CONTEXTS = (256, 2048, 4096)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers mqa", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16, help="decoded at each point")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for kv_heads in (16, 4, 1):
        shape = replace(
            SHAPE, hidden_size=512, intermediate_size=1024, num_attention_heads=HEADS, num_key_value_heads=kv_heads,
            max_position_embeddings=CONTEXTS[-1] + given.tokens + 8,
        )  # fmt: skip
        torch.manual_seed(given.seed)
        with tempfile.TemporaryDirectory() as scratch:
            write_folder(Decoder(shape), read_tokenizer(zoo.path_of(zoo.DEFAULT)), Path(scratch))
            for context in CONTEXTS:
                rows.append({"kv_heads": kv_heads, "context": context, **_point(Path(scratch), context, given.tokens)})
    table(
        ("KV heads", "context", "KV MiB", "tokens", "kernels", "ms a token", "CPU ms a token"),
        [tuple(row.values()) for row in rows],
    )
    labels = [(f"{r['kv_heads']} of {HEADS} heads, {r['context']} tokens", r["ms_a_token"]) for r in rows]
    bars(given.figure, "Decoding, ms a token (fastest), random weights, resident", labels)
    emit("mqa", rows, seed=given.seed)


def _point(folder: Path, context: int, tokens: int) -> dict[str, Any]:
    """The fastest of the tokens decoded behind a prompt of `context` tokens: on the clock, and in processor time."""
    with fc.load(folder, stream="never", context=context + tokens + 1) as engine:
        prompt = [(7 * i) % 4000 + 1 for i in range(context)]
        marks = [
            (time.perf_counter(), time.process_time())
            for _ in engine.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        ]
        kernels = engine.report().to_dict()["kernels"]
        steps = list(itertools.pairwise(marks))
        size = engine.model.kv_bytes_per_token * context / 2**20
    return {
        "kv_mib": size,
        "tokens": len(marks),
        "kernels": kernels,
        "ms_a_token": min(b[0] - a[0] for a, b in steps) * 1e3,
        "cpu_ms_a_token": min(b[1] - a[1] for a, b in steps) * 1e3,
    }
