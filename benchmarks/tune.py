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
from .small_runs import Kept, table

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
    parser.add_argument("--held-out", type=Path, required=True, help="JSONL of rows to judge by")
    parser.add_argument("--rows", type=int, default=6000, help="of the data, its first")
    parser.add_argument("--judged", type=int, default=300, help="rows held out, the first of their file")
    parser.add_argument("--longest", type=int, default=192, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1, help="the first of three")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kept", type=Path, help="JSONL of runs that are done, which are not repeated")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(argv)
    kept = Kept(given.kept)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        data, held_out = first(given.data, given.rows, scratch), first(given.held_out, given.judged, scratch)
        for seed in range(given.seed, given.seed + given.seeds):
            for number, (name, way) in enumerate(WAYS.items()):
                what = {
                    "way": name, "seed": seed, "steps": given.steps, "batch": given.batch, "longest": given.longest,
                    "learning_rate": given.learning_rate,
                }  # fmt: skip
                row = kept.find(**what)
                if row is None:
                    found = tune(
                        zoo.path_of(MODEL), Path(scratch) / f"{seed}-{number}", data, held_out=held_out,
                        steps=given.steps, batch=given.batch, seed=seed, learning_rate=given.learning_rate,
                        longest=given.longest, threads=1, **way,
                    )  # fmt: skip
                    assert found is not None
                    row = kept.add(what | {when: figures(found[when]) for when in ("before", "after")})
                    print(row, file=sys.stderr, flush=True)
                runs[name].append(row)
    rows = [summary(name, found) for name, found in runs.items()]
    columns = (
        "tuned",
        "nats before",
        "nats after",
        "each seed",
        "p(stop) before",
        "after",
        "busiest/mean before",
        "after",
    )
    table(columns, [tuple(row.values()) for row in rows])
    title = f"{MODEL}, tuned: held-out answers, nats a token"
    nats = [(r["tuned"], r["nats_after"]) for r in rows]
    bars(given.figure, title, nats, start=int(min(n for _, n in nats) * 10 - 1) / 10)
    emit("tune", rows, seed=given.seed, seeds=given.seeds, steps=given.steps, batch=given.batch)


def first(path: Path, count: int, scratch: str) -> Path:
    """A copy of the first `count` lines."""
    copy = Path(scratch) / path.name
    copy.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:count]))
    return copy


def figures(judged: dict[str, Any]) -> dict[str, Any]:
    """Of what `tune` says of a model: the busiest expert over the mean is that of the most uneven layer."""
    return {
        "nats": judged["nats"], "stop": judged["stop_probability"], "max_over_mean": max(judged["max_over_mean"]),
    }  # fmt: skip


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and the loss of each."""

    def mean(when: str, figure: str) -> float:
        return float(sum(run[when][figure] for run in runs) / len(runs))

    return {
        "tuned": name,
        "nats_before": mean("before", "nats"),
        "nats_after": mean("after", "nats"),
        "each": ", ".join(f"{run['after']['nats']:.3f}" for run in runs),
        "stop_before": mean("before", "stop"),
        "stop_after": mean("after", "stop"),
        "max_over_mean_before": mean("before", "max_over_mean"),
        "max_over_mean_after": mean("after", "max_over_mean"),
    }
