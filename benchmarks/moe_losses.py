"""Table 6 of 1701.06538 at small scale: what the importance and load losses do to balance and perplexity."""

from __future__ import annotations

import sys

from .figure import bars
from .machine import emit
from .small_runs import arguments, balance, corpus_of, run, small, table

EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# (importance weight, load weight): the paper's perplexity and max/mean load, where PAPER gives them.
PAPER: dict[tuple[float, float], tuple[float, float] | None] = {
    (0.0, 0.0): (39.8, 17.80),
    (0.1, 0.1): (35.6, 1.14),
    (0.2, 0.0): None,
    (0.0, 0.2): None,
    (0.01, 0.01): None,
    (1.0, 1.0): None,
}


def main(argv: list[str]) -> None:
    """--all: the weights too that are not held against a figure of the paper here."""
    every = "--all" in argv
    given = arguments([word for word in argv if word != "--all"], __doc__ or "")
    corpus = corpus_of(small(EXPERTS, given.steps, given.seed), given.data)
    rows = []
    for (importance, load), theirs in PAPER.items():
        if theirs is None and not every:
            continue
        recipe = small(EXPERTS, given.steps, given.seed, importance_weight=importance, load_weight=load)
        found = run(recipe, corpus)
        cv_importance, cv_load, most = balance(found.aux)
        rows.append({
            "importance_weight": importance, "load_weight": load, "perplexity": found.perplexity,
            "cv_importance": cv_importance, "cv_load": cv_load, "max_over_mean": most,
            "paper_perplexity": theirs and theirs[0], "paper_max_over_mean": theirs and theirs[1],
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    columns = ("w importance", "w load", "perplexity", "CV importance", "CV load", "max/mean", "paper ppl", "paper max")
    table(columns, [tuple("" if value is None else value for value in row.values()) for row in rows])
    labels = [(f"w = ({r['importance_weight']}, {r['load_weight']})", r["max_over_mean"]) for r in rows]
    bars(given.figure, "Busiest expert over the mean, 16 experts of which 2 a token", labels)
    emit("moe-losses", rows, seed=given.seed, steps=given.steps)
