"""Freezing the router, the experts or nothing while tuning (2305.14705, table 4), and the auxiliary losses beside."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from flashinfer_cli import zoo
from flashinfer_cli.apps.tune import tune

from .figure import bars
from .machine import emit
from .small_runs import table

MODEL = "stories-moe"
WAYS: dict[str, dict[str, Any]] = {
    "nothing frozen": {},
    "router frozen": {"freeze": "router"},
    "experts frozen": {"freeze": "experts"},
    "both losses, w = 0.1": {"importance_weight": 0.1, "load_weight": 0.1},
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers tune", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of instruction, input, output")
    parser.add_argument("--rows", type=int, default=1500, help="of the file, its first")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_bytes(b"".join(given.data.read_bytes().splitlines(keepends=True)[: given.rows]))
        for name, way in WAYS.items():
            out = Path(scratch) / name.replace(" ", "-").replace(",", "")
            found = tune(zoo.path_of(MODEL), out, data, steps=given.steps, batch=4, seed=given.seed, threads=1, **way)
            assert found is not None
            before, after = found["before"], found["after"]
            rows.append({
                "tuned": name, "nats_before": before["nats"], "nats_after": after["nats"],
                "stop_before": before["stop_probability"], "stop_after": after["stop_probability"],
                "max_over_mean_before": max(before["max_over_mean"]),
                "max_over_mean_after": max(after["max_over_mean"]),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    columns = ("tuned", "nats before", "nats after", "p(stop) before", "after", "busiest/mean before", "after")
    table(columns, [tuple(row.values()) for row in rows])
    bars(given.figure, f"{MODEL}, tuned: held-out answers, nats a token", [(r["tuned"], r["nats_after"]) for r in rows])
    emit("tune", rows, seed=given.seed, steps=given.steps)
