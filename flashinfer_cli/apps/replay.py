"""Policies over a recorded trace, without the model: how often each finds what is asked for, at every cache size, what
it reads a token, and how many tokens a second to expect (`expected.py`).

Beside each other stand chance (a cache of that share of the records, filled blindly), the policies, and Belady's
optimum, which knows the future and bounds them all. What it misses is split too: first uses, which nothing can avoid,
and what does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..cache.by_layer import ByLayer, policies_by_layer
from ..cache.expert_policies import expert_policy
from ..cache.policy import Belady, Lru, Policy
from ..cache.trace import Demand, Trace, read_trace
from ..cache.window import deal
from ..config import EXPERT_POLICIES, FORESEEING, NEURON_POLICIES, RunConfig
from ..errors import UsageError
from .expected import Expected
from .recommended import recommend

FINE = 16  # at most so many records a layer: every number of them; above, the shares below
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What a policy made of a trace: shares of the demanded records found in the cache, bytes missed a token, and the
    rate to expect where the trace says what its run measured."""

    hit_ratio: float
    prefill_hit_ratio: float | None
    bytes_per_token: float
    tokens_per_second: float | None = None


AnyPolicy = Policy | ByLayer
P = TypeVar("P", bound=Policy | ByLayer)


def run_policy(policy: P, demands: Sequence[Demand], *, filled: bool = False) -> P:
    """Put the demands through a policy, which counts; `filled` says that the run began with everything in place."""
    if filled:
        import numpy as np

        for layer, count in policy.records.items():
            policy.demand(layer, np.arange(count)[None], "load")
    for each in demands:
        if each.worth is not None:
            policy.expect(each.layer, each.worth)
        policy.demand(each.layer, each.chosen, each.phase)
    return policy


def as_it_ran(trace: Trace) -> AnyPolicy:
    """The policy and size of the run that was recorded: the same hits and misses as it counted itself."""
    if trace.kind == "neurons":
        room, prompt_room = (
            {int(layer): int(slots) for layer, slots in found.items()}
            for found in (trace.about["room"], trace.about.get("prompt_room", trace.about["room"]))
        )
        name = "recent" if trace.about["filled"] else trace.about["policy"]  # what is pinned never goes
        neurons = policies_by_layer(name, trace.records, room, trace.about["window"], prompt_room)
        return run_policy(neurons, trace.demands, filled=trace.about["filled"])
    policy = expert_policy(trace.about["policy"], trace.records, trace.about["slots"])
    return run_policy(policy, trace.demands, filled=trace.about.get("filled", False))


def replay(
    file: Path,
    *,
    policies: Sequence[str] = (),
    shares: Sequence[float] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run `policies` (all, if none) over a trace at cache sizes of these shares of all records (some of its own
    choosing if none).

    Plain values only, ready for JSON. Raises UsageError where the file is no trace, or there is nothing in it.
    """
    trace = read_trace(file)
    phase = "decode" if any(each.phase == "decode" for each in trace.demands) else "prefill"
    if not any(each.phase == phase for each in trace.demands):
        raise UsageError(f"'{file}' holds no demand.", "Record a longer run.")
    foreseen = any(each.worth is not None for each in trace.demands)
    blind = FORESEEING - {trace.about.get("policy")} if not foreseen else set()
    if {*policies} & blind:
        raise UsageError(
            f"'{file}' says nothing of what {trace.kind} were thought to be worth.",
            "Traces of before say nothing of it, nor do models whose gate chooses groups; try another policy.",
        )
    known = NEURON_POLICIES if trace.kind == "neurons" else EXPERT_POLICIES
    policies = policies or [name for name in known if name not in blind]
    total = sum(trace.records.values())
    sizes = [max(1, round(total * share)) for share in shares] or _sizes(trace)
    ran = _ran(trace, phase)
    expected = None
    if trace.measured is not None and ran is not None and phase == "decode":
        expected = Expected(trace.measured, ran["bytes_per_token"])
    points = []
    for done, slots in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes))
        points.append(_point(trace, phase, slots, policies, expected))
    chosen = ran["policy"] if ran is not None and ran["policy"] in policies else points[-1]["best"]
    measured = None if trace.measured is None else {**vars(trace.measured)}
    if measured is not None:
        del measured["plans"]  # each point has its own
    return {
        "file": str(file), "kind": trace.kind, "phase": phase, "about": trace.about,
        "layers": len(trace.records), "records": total, "bytes": sum(_bytes_of(trace).values()),
        "tokens": _tokens(trace, phase), "demanded": _demanded(trace, phase),
        "as_it_ran": ran, "measured": measured,
        "points": points, "recommended": None if expected is None else recommend(points, chosen),
        "recall": recall(trace, phase),
    }  # fmt: skip


def _ran(trace: Trace, phase: str) -> dict[str, Any] | None:
    """What the policy that ran makes of the trace, in the room it had, and what the run itself counted and measured;
    None for traces that do not say how they were made."""
    try:
        policy = as_it_ran(trace)
    except (KeyError, UsageError):  # an older trace, or a policy that is no more
        return None
    slots = sum(policy.room.values()) if isinstance(policy, ByLayer) else policy.capacity
    found, measured = _found(trace, phase, policy), trace.measured if phase == "decode" else None
    return {
        "policy": trace.about["policy"], "slots": slots, "share": slots / sum(trace.records.values()),
        "hits": policy.hits(phase), "misses": policy.misses(phase),
        "hit_ratio": found.hit_ratio, "bytes_per_token": found.bytes_per_token,
        "counted": None if measured is None else {"hits": measured.hits, "misses": measured.misses},
        "tokens_per_second": None if measured is None else measured.tokens / measured.seconds,
    }  # fmt: skip


def _tokens(trace: Trace, phase: str) -> int:
    """Tokens that came out: of drafts, those that stood."""
    return trace.measured.tokens if trace.measured is not None and phase == "decode" else trace.tokens(phase)


def _sizes(trace: Trace) -> list[int]:
    total, most = sum(trace.records.values()), max(trace.records.values())
    shares = [k / most for k in range(1, most)] if most <= FINE else list(SHARES)
    return sorted({max(1, round(total * share)) for share in shares})


def _bytes_of(trace: Trace) -> dict[int, int]:
    return {layer: count * trace.record_bytes[layer] for layer, count in trace.records.items()}


def _demanded(trace: Trace, phase: str) -> int:
    """Distinct records asked for, a pass and a layer at a time."""
    return sum(len({*each.chosen[each.chosen >= 0].tolist()}) for each in trace.demands if each.phase == phase)


def _point(trace: Trace, phase: str, slots: int, policies: Sequence[str], expected: Expected | None) -> dict[str, Any]:
    total = sum(trace.records.values())

    def judged(policy: AnyPolicy) -> Found:
        made = _found(trace, phase, policy)
        if expected is None:
            return made
        return replace(made, tokens_per_second=expected.tokens_per_second(made.bytes_per_token, slots))

    found = {name: judged(run_policy(_policy(trace, name, slots), trace.demands)) for name in policies}
    plain = [(each.layer, each.chosen) for each in trace.demands]
    bound = run_policy(Belady(trace.records, slots, plain), trace.demands)
    apart = Belady(trace.records, slots, plain, per_layer=True)
    if trace.kind == "neurons":
        apart.quota = _room(trace, slots)
    run_policy(apart, trace.demands)
    never = run_policy(Lru(trace.records, total), trace.demands)
    best = max(found, key=lambda name: found[name].hit_ratio)
    chance, asked = slots / total, bound.hits(phase) + bound.misses(phase)
    limit, cold = bound.hits(phase) / asked, never.misses(phase) / asked
    return {
        "slots": slots,
        "share": chance,
        "bytes": round(chance * sum(_bytes_of(trace).values())),
        "memory": None if expected is None else expected.memory(slots),
        "policies": {name: vars(each) for name, each in found.items()},
        "best": best,
        "belady": vars(judged(bound)),
        "belady_by_layer": vars(judged(apart)),
        # Shares of all that is asked for, summing to one.
        "gap": {
            "chance": chance,
            "policy": found[best].hit_ratio - chance,
            "order": limit - found[best].hit_ratio,
            "room": 1 - cold - limit,
            "cold": cold,
        },
    }


def _policy(trace: Trace, name: str, slots: int) -> AnyPolicy:
    """A policy by name, with room for `slots` of all records; that of neurons is dealt to the layers beforehand."""
    if trace.kind == "experts":
        return expert_policy(name, trace.records, slots)
    return policies_by_layer(name, trace.records, _room(trace, slots), trace.about.get("window", RunConfig.window))


def _room(trace: Trace, slots: int) -> dict[int, int]:
    """Slots for neurons by layer, dealt by need."""
    wants = {int(layer): float(share) for layer, share in trace.about.get("wants", {}).items()}
    return deal(slots, trace.records, dict.fromkeys(trace.records, 1), wants)


def _found(trace: Trace, phase: str, policy: AnyPolicy) -> Found:
    def ratio(name: str) -> float | None:
        asked = policy.hits(name) + policy.misses(name)
        return policy.hits(name) / asked if asked else None

    missed = sum(
        misses * trace.record_bytes[layer] for (name, layer), (_, misses) in policy.counts.items() if name == phase
    )
    return Found(ratio(phase) or 0.0, ratio("prefill"), missed / max(_tokens(trace, phase), 1))


def recall(trace: Trace, phase: str) -> list[dict[str, Any]]:
    """Of guesses in a trace, by how many layers ahead: the share of what was needed among the first m, beside m/E."""
    found: dict[int, list[list[int]]] = {}
    experts = max(trace.records.values())
    for each in trace.demands:
        needed = {*each.chosen[each.chosen >= 0].tolist()}
        if each.phase != phase or not needed:
            continue
        for ahead, guesses in each.guesses.items():
            counts = found.setdefault(ahead, [])
            right = 0
            for number, guess in enumerate(guesses.tolist()):
                right += guess in needed
                if number == len(counts):
                    counts.append([0, 0])
                counts[number][0] += right
                counts[number][1] += len(needed)
    return [
        {
            "ahead": ahead,
            "recall": [right / of for right, of in counts],
            "chance": [(number + 1) / experts for number in range(len(counts))],
        }
        for ahead, counts in sorted(found.items())
    ]
