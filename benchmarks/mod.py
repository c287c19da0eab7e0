"""Mixture-of-Depths (2404.02258) beside dense models of equal compute, and what its zoo model skips at decoding."""

from __future__ import annotations

from typing import Any

from flashinfer_cli import zoo
from flashinfer_cli.training.objective import mean

from .figure import bars
from .machine import emit
from .small_runs import arguments, corpus_of, run, small, table

LAYERS, CAPACITY = 4, 0.125
BLOCKS = LAYERS / 2 * (1 + CAPACITY)  # whole blocks a token costs: half of them, and an eighth of the others


def main(argv: list[str]) -> None:
    given = arguments(argv, __doc__ or "")
    skipping = {"num_hidden_layers": LAYERS, "mod_capacity": CAPACITY}
    runs: dict[str, tuple[dict[str, Any], int]] = {
        f"MoD, {LAYERS} blocks, {CAPACITY:.1%} in every second": (skipping, given.steps),
        f"dense, {LAYERS} blocks, equal FLOPs in all": (
            {"num_hidden_layers": LAYERS}, round(given.steps * BLOCKS / LAYERS)),
        "dense, 2 blocks, equal FLOPs in all": ({"num_hidden_layers": 2}, round(given.steps * BLOCKS / 2)),
        f"dense, {LAYERS} blocks, equal tokens": ({"num_hidden_layers": LAYERS}, given.steps),
    }  # fmt: skip
    corpus = corpus_of(small(skipping, given.steps, given.seed), given.data)
    rows: list[dict[str, Any]] = []
    for name, (shape, steps) in runs.items():
        found = run(small(shape, steps, given.seed), corpus)
        row: dict[str, Any] = {"model": name, "steps": steps, "nats": found.nats, "ms_a_step": found.seconds * 1e3}
        if "mod_capacity" in shape:
            found.training.model.eval()
            _, aux = found.training.model(corpus.held_out[0][:, :-1])
            row |= {
                "router_agreement": float(mean(aux.router_agreement)),
                "predictor_agreement": float(mean(aux.predictor_agreement)),
                "skipped": 1 - float(mean([c for c in found.aux.computed if len(c)])),
            }
        rows.append(row)
    shown = ("router_agreement", "predictor_agreement", "skipped")
    table(
        ("model", "steps", "nats a token", "ms a step", "router agrees", "predictor agrees", "skipped when causal"),
        [(*list(row.values())[:4], *(row.get(key, "") for key in shown)) for row in rows],
    )
    rows.append({"model": "zoo:stories-mod", **decoding()})
    print("\nzoo:stories-mod at decoding:", {k: v for k, v in rows[-1].items() if k != "model"})
    labels = [(r["model"], r["nats"]) for r in rows[:-1]]
    bars(given.figure, "Held-out nats a token", labels, start=float(int(min(n for _, n in labels))))
    emit("mod", rows, seed=given.seed, steps=given.steps)


def decoding() -> dict[str, Any]:
    """What the zoo's model skips and reads where nothing may stay in memory but what must."""
    import flashinfer_cli as fc
    from flashinfer_cli.config import SamplingParams

    found: dict[str, Any] = {}
    for name in ("stories-mod", "stories-relu"):  # every block of the latter computes every token
        with fc.load(zoo.path_of(name), stream="always") as engine:
            list(engine.generate("Once upon a time", SamplingParams(max_tokens=100, seed=1)))
            report = engine.report().to_dict()
        decode = report["decode"]
        found |= {
            f"{name}_skipped": decode["skipped"],
            f"{name}_bytes_per_token": decode["bytes_per_token"],
            f"{name}_weight_bytes": report["model"]["weight_bytes"],
        }
    return found
