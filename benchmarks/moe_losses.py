"""Table 6 of 1701.06538 at small scale: what the importance and load losses do to balance and perplexity."""

from __future__ import annotations

import sys

from .figure import bars
from .machine import emit
from .small_runs import arguments, balance, corpus_of, late_balance, run, small, table

EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# (importance weight, load weight): the paper's perplexity, CV of importance, CV of load, max/mean load (its table 6).
PAPER: dict[tuple[float, float], tuple[float, float, float, float]] = {
    (0.0, 0.0): (39.8, 3.04, 3.01, 17.80),
    (0.1, 0.1): (35.6, 0.06, 0.05, 1.14),
    (0.2, 0.0): (35.6, 0.06, 0.17, 1.47),
    (0.0, 0.2): (35.7, 0.22, 0.04, 1.15),
    (0.01, 0.01): (35.7, 0.48, 0.11, 1.37),
    (1.0, 1.0): (35.7, 0.03, 0.02, 1.07),
}


def main(argv: list[str]) -> None:
    """--few: the first row and (0.1, 0.1) alone."""
    few = "--few" in argv
    given = arguments([word for word in argv if word != "--few"], __doc__ or "", steps=300)
    corpus = corpus_of(small(EXPERTS, given.steps, given.seed), given.data)
    rows = []
    for (importance, load), theirs in PAPER.items():
        if few and (importance, load) not in ((0.0, 0.0), (0.1, 0.1)):
            continue
        recipe = small(EXPERTS, given.steps, given.seed, importance_weight=importance, load_weight=load)
        found = run(recipe, corpus)
        noisy, quiet = late_balance(found.training), balance(found.aux)
        rows.append({
            "importance_weight": importance, "load_weight": load, "perplexity": found.perplexity,
            "cv_importance": noisy[0], "cv_load": noisy[1], "max_over_mean": noisy[2],
            "max_over_mean_without_noise": quiet[2], "ms_a_step": found.seconds * 1e3,
            "paper": theirs,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    columns = (
        "w importance", "w load", "perplexity", "CV importance", "CV load", "max/mean", "max/mean, no noise",
        "ms a step", "paper: ppl", "CV imp.", "CV load", "max/mean",
    )  # fmt: skip
    table(columns, [(*list(row.values())[:-1], *row["paper"]) for row in rows])
    labels = [(f"w = ({r['importance_weight']}, {r['load_weight']})", r["max_over_mean"]) for r in rows]
    bars(given.figure, "Busiest expert over the mean, 16 experts of which 2 a token", labels)
    emit("moe-losses", rows, seed=given.seed, steps=given.steps)
