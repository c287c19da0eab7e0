"""python -m benchmarks.micro [kernels]: how fast each kernel goes through weights, beside what memory gives.

The bound first, then a line a kernel, then one line of JSON. Weights are larger than the caches unless a line says
otherwise; rates count stored bytes, so a block format's weights a second are in a column of their own.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flashinfer_cli.checkpoint.base import FORMATS, PLAIN
from flashinfer_cli.kernels import Kernels, select
from flashinfer_cli.kernels.pool import usable_cores

from .machine import best, memory_bandwidth

ROWS, COLS = 8960, 1536  # the up projection of a 1.5B model
LARGE = 192 << 20  # bytes of weights gone through in turn, so that none is still in a cache


def stored(fmt: str, rows: int, cols: int) -> torch.Tensor:
    """Random bytes that are small finite numbers in the format."""
    elements, size = FORMATS[fmt]
    if fmt in PLAIN:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[fmt]
        return torch.randn(rows, cols).to(dtype).view(torch.uint8)
    data = np.random.default_rng(0).integers(0, 32, (rows, cols // elements * size), np.uint8)
    return torch.from_numpy(data)


def linear_row(kernels: Kernels, fmt: str, tokens: int, rows: int, cols: int) -> dict[str, Any]:
    width = cols // FORMATS[fmt][0] * FORMATS[fmt][1]
    copies = max(1, LARGE // (rows * width)) if rows * width > 4 << 20 else 1
    weights = [stored(fmt, rows, cols)]
    weights += [weights[0].clone() for _ in range(copies - 1)]
    x, out, turn = torch.randn(tokens, cols), torch.empty(tokens, rows), 0

    def work() -> None:
        nonlocal turn
        turn = (turn + 1) % copies
        kernels.linear(x, weights[turn], fmt, out, 0)

    seconds = best(work, least=2 * copies if tokens <= 16 else 2)
    return {"kernel": "linear", "format": fmt, "tokens": tokens, "rows": rows, "cols": cols} | rates(
        seconds, rows * width, rows * cols, tokens
    )


def ffn_row(kernels: Kernels, fmt: str, tokens: int, n: int, d: int) -> dict[str, Any]:
    width = -(-3 * d // FORMATS[fmt][0] * FORMATS[fmt][1] // 512) * 512
    copies = max(1, LARGE // (n * width))
    records = [torch.zeros(n, width, dtype=torch.uint8) for _ in range(copies)]
    body = stored(fmt, n, 3 * d)
    for record in records:
        record[:, : body.shape[1]] = body
    x, out, turn = torch.randn(tokens, d), torch.zeros(tokens, d), 0

    def work() -> None:
        nonlocal turn
        turn = (turn + 1) % copies
        kernels.ffn_records(x, records[turn], fmt, True, "silu", None, out)

    seconds = best(work, least=2 * copies if tokens <= 16 else 2)
    return {"kernel": "ffn_records", "format": fmt, "tokens": tokens, "rows": n, "cols": d} | rates(
        seconds, n * width, 3 * n * d, tokens
    )


def rates(seconds: float, stored_bytes: int, weights: int, tokens: int) -> dict[str, Any]:
    return {
        "us": round(seconds * 1e6, 1),
        "GB/s": round(stored_bytes / seconds / 1e9, 2),
        "Gweights/s": round(weights / seconds / 1e9, 2),
        "GFLOP/s": round(2 * weights * tokens / seconds / 1e9, 1),
    }


def kernel_rows(kernels: Kernels, show: Callable[[dict[str, Any]], None]) -> None:
    for fmt in FORMATS:
        if fmt in PLAIN or FORMATS[fmt][0] > 1:
            show(linear_row(kernels, fmt, 1, ROWS, COLS))
    for fmt in ("F32", "BF16", "Q8_0", "Q8_G128", "Q4_G64", "Q4_K"):
        for tokens in (2, 4, 8, 16):
            show(linear_row(kernels, fmt, tokens, ROWS, COLS))
    for fmt in ("F32", "BF16", "F16", "Q8_0", "Q4_K"):
        show(linear_row(kernels, fmt, 512, ROWS, COLS))
    for rows, cols in (
        (COLS, ROWS),
        (576, 576),
        (192, 576),
        (8, 32),
    ):  # down projection; small ones; the price of a call
        show(linear_row(kernels, "BF16", 1, rows, cols))
    for fmt in (*PLAIN, "Q8_0", "Q8_G128", "Q4_1", "Q4_G64"):
        for tokens, n in ((1, 8960), (8, 8960), (1, 227), (512, 227)):  # 227: a slice of 2 MiB of bfloat16
            show(ffn_row(kernels, fmt, tokens, n, 1536))


def main() -> None:
    wanted = sys.argv[1:] or ["kernels"]
    if wanted != ["kernels"]:
        sys.exit("usage: python -m benchmarks.micro [kernels]")
    cores = usable_cores()
    rows: list[dict[str, Any]] = []
    bandwidth = {threads: memory_bandwidth(threads) for threads in sorted({1, cores})}
    for threads, rate in bandwidth.items():
        print(f"memory, {threads} thread(s): {rate / 1e9:.1f} GB/s", file=sys.stderr)
        torch.set_num_threads(threads)
        kernels, warning = select("cpu", threads=threads)
        if warning:
            print(warning, file=sys.stderr)

        def show(row: dict[str, Any], threads: int = threads, rate: float = rate) -> None:
            row |= {"threads": threads, "of_memory": round(row["GB/s"] * 1e9 / rate, 2)}
            rows.append(row)
            name = f"{row['kernel']} {row['format']} {row['rows']}x{row['cols']} T={row['tokens']}"
            print(
                f"  {name:36}{row['us']:>11.1f} us {row['GB/s']:>7.2f} GB/s {row['of_memory']:>5.0%} of memory"
                f" {row['Gweights/s']:>7.2f} Gweights/s {row['GFLOP/s']:>7.1f} GFLOP/s",
                file=sys.stderr,
            )

        kernel_rows(kernels, show)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": cores,
        "kernels": select("cpu")[0].name,
        "torch": torch.__version__,
    }
    machine["memory_GB/s"] = {str(threads): round(rate / 1e9, 1) for threads, rate in bandwidth.items()}
    print(json.dumps({"benchmark": "micro", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
