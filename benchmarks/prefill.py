"""python -m benchmarks.prefill: how near a long prompt comes to what the machine allows, under a memory cap, cold.

Two bounds, of which the larger counts: bytes that cannot stay under the cap over the drive's rate, read once a chunk;
and the multiplications of the prompt over the rate at which torch multiplies float32 matrices of the model's shapes,
which is what our products of many tokens are made of. The drive and the multiplier are measured just before and just
after the run, as others use them too.

    python -m benchmarks.prefill --folder DIR [--models qwen-1.5b llama-3g] [--cap 0.5] [--prompt 512]
                                 [--systems ours llama.cpp] [--peer-python PYTHON]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Kind

from flashinfer_cli.models.open import open_model

from . import cgroup, machine
from .gguf_files import write
from .peers import DEFAULT_READAHEAD, MOST, arguments, checkpoint, run, weight_bytes


def multiply_rate(tokens: int, rows: int, cols: int, threads: int) -> float:
    """Float operations a second of torch's float32 product [tokens, cols] x [cols, rows]."""
    import torch

    torch.set_num_threads(threads)
    x, weight = torch.randn(tokens, cols), torch.randn(rows, cols)
    return 2 * tokens * rows * cols / machine.best(lambda: torch.nn.functional.linear(x, weight))


def operations(folder: Path, tokens: int) -> tuple[float, int, int]:
    """(float operations of a prompt, d_ff, d): every matrix of a layer for every token, the head for one, attention."""
    config = open_model(folder).config
    d, ff, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = layers * (d * (2 * heads + 2 * kv) + (3 if config.gated else 2) * d * ff)
    attention = layers * 2 * heads * tokens / 2  # scores and values, the causal half, a token
    return 2.0 * tokens * (matrices + attention) + 2.0 * d * config.vocab_size, ff, d


def measure(
    name: str, folder: Path, share: float, tokens: int, systems: list[str], python: str, threads: int
) -> list[dict[str, Any]]:
    source, rows = checkpoint(name, folder), []
    sample = next(iter(sorted(source.glob("*.safetensors"))))
    size = weight_bytes(source)
    cap = int(share * size)
    work, ff, d = operations(source, tokens)
    print(f"\n{name}: {size / 1e9:.2f} GB, cap {cap / 1e9:.2f} GB, {tokens} tokens, {work / 1e12:.2f} T operations")
    for system in systems:
        file = write(source, source.with_name(f"{name}-BF16.gguf"), Kind.BF16) if system == "llama.cpp" else source
        for kb in (None, DEFAULT_READAHEAD) if system == "llama.cpp" else (None,):
            before = machine.drive_rate(sample), multiply_rate(tokens, ff, d, threads)
            row = {"model": name, "cap": cap, "share": share, "system": system, "prompt": tokens}
            try:
                got = run(system, sys.executable if system == "ours" else python, file, cap, 2, tokens, kb, MOST)
            except cgroup.CappedError as error:
                rows.append(row | {"error": str(error)})
                print(f"  {system:10} {error}", flush=True)
                continue
            after = machine.drive_rate(sample), multiply_rate(tokens, ff, d, threads)
            drive, multiply = ((a + b) / 2 for a, b in zip(before, after, strict=True))
            chunks = math.ceil(tokens / got.get("chunk", tokens))
            reading, computing = chunks * (size - cap) / drive, work / multiply
            bound = max(reading, computing)
            again = got["prefill_bytes"] / (chunks * size)
            rows.append(
                row | got | {"drive_bytes_s": drive, "multiply_flop_s": multiply, "bound_s": bound, "chunks": chunks}
            )
            print(
                f"  {system:10} readahead {got['readahead_kb']:>5} KB  {got['prefill_s']:6.2f} s  "
                f"{got['prefill_tok_s']:6.1f} tok/s  {got['prefill_bytes'] / 1e9:5.2f} GB read, {again:.2f} of it "
                f"a chunk, {chunks} chunks  peak {got['peak_charge'] / 1e9:.2f} GB  bound: reading {reading:.2f} s at "
                f"{drive / 1e9:.2f} GB/s, computing {computing:.2f} s at {multiply / 1e9:.0f} GFLOP/s; "
                f"{bound / got['prefill_s']:.0%} of it",
                flush=True,
            )
    return rows


def main() -> None:
    parser = arguments(__doc__, ["ours"], "llama.cpp")
    parser.add_argument("--cap", type=float, default=0.5, help="share of the weights")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models:
        rows += measure(name, given.folder, given.cap, given.prompt, given.systems, given.peer_python, given.threads)
    machine.emit("prefill", rows)


if __name__ == "__main__":
    main()
