"""The memory that `replay` recommends, and how that is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import MiB, format_size

WITHIN = 0.05  # of the best rate: nearer is not worth the memory


def recommend(points: Sequence[Mapping[str, Any]], policy: str) -> dict[str, Any] | None:
    """The least of the sizes at which a policy is expected to reach all but WITHIN of the best of its rates."""
    rates = [(point["policies"][policy]["tokens_per_second"], point) for point in points]
    if any(rate is None for rate, _ in rates):
        return None
    best, at_best = max(rates, key=lambda each: each[0])
    rate, least = min((each for each in rates if each[0] >= (1 - WITHIN) * best), key=lambda each: each[1]["slots"])
    return {
        "policy": policy, "within": WITHIN, "tokens_per_second": rate,
        **{name: least[name] for name in ("slots", "share", "bytes", "memory")},
        "best_tokens_per_second": best, "best_share": at_best["share"],
    }  # fmt: skip


def recommended_words(found: Mapping[str, Any]) -> str:
    """The line for what `replay` found, read back from JSON or not; where there are no rates, why."""
    said = found["recommended"]
    if said is None:
        if found["phase"] != "decode":
            return (
                "No token of this trace was decoded: record a longer run for expected tok/s and a memory to recommend."
            )
        return "This trace does not say what its run measured: record it anew for expected tok/s and what to recommend."
    slots = f"{format_size(said['bytes'])} of slots ({said['share']:.1%} of the {found['kind']})"
    if said["memory"] is not None:
        budget, context = -(-said["memory"] // MiB), found["measured"]["context"]
        slots = f"--memory {budget}MiB with --context {context}, for {slots}"
    rate, best = in_rate(said["tokens_per_second"]), in_rate(said["best_tokens_per_second"])
    return (
        f"Recommended: {slots}: {rate} tok/s to expect of policy {said['policy']}, at the least of these sizes within "
        f"{said['within']:.0%} of its best, {best} at {said['best_share']:.1%}."
    )


def in_rate(value: float) -> str:
    """Tokens a second as people read them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
