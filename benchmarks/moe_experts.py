"""Perplexity against the number of experts at equal compute a token, as figure 2 of 1701.06538 at small scale."""

from __future__ import annotations

from .figure import bars
from .machine import emit
from .small_runs import arguments, corpus_of, late_balance, run, small, table

SIZE, CHOSEN = 48, 2
COUNTS = (4, 16, 64)


def main(argv: list[str]) -> None:
    given = arguments(argv, __doc__ or "")
    shapes = {"dense": {"intermediate_size": SIZE * CHOSEN}} | {
        str(n): {"num_experts": n, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": SIZE} for n in COUNTS
    }
    corpus = corpus_of(small(shapes["dense"], given.steps, given.seed), given.data)
    rows = []
    for name, shape in shapes.items():
        found = run(small(shape, given.steps, given.seed), corpus)
        rows.append({
            "experts": name,
            "parameters": sum(p.numel() for p in found.training.model.parameters()),
            "perplexity": found.perplexity,
            "max_over_mean": late_balance(found.training)[2] if "num_experts" in shape else 1.0,
            "ms_a_step": found.seconds * 1e3,
        })  # fmt: skip
    table(("experts", "weights", "perplexity", "max/mean", "ms a step"), [tuple(row.values()) for row in rows])
    least = min(r["perplexity"] for r in rows)
    labels = [(f"{r['experts']} experts" if r["experts"] != "dense" else "dense", r["perplexity"]) for r in rows]
    bars(given.figure, "Perplexity, equal compute a token", labels, start=float(int(least * 0.9)))
    emit("moe-experts", rows, seed=given.seed, steps=given.steps)
