"""Record which experts or neurons every token of a run asks for, and what the run measured, for `replay`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cache.neurons import NeuronCache
from ..cache.pinned import Pinned
from ..cache.trace import Measured, TraceWriter, open_trace
from ..config import NEURON_WINDOW
from ..engine import Engine
from ..errors import UsageError
from ..store.drive import DriveRate
from .budgets import planned_budgets

RECORD_READS = ("expert", "guess", "neuron")  # kinds of reads that bring records


@contextmanager
def recording(engine: Engine, path: Path) -> Iterator[TraceWriter]:
    """Write what the engine's experts are asked for, and the guesses of it, into `path` while the block runs; of a
    calibrated model the neurons. What the run measured is the caller's to add: `TraceWriter.end` with `measured`.

    Raises UsageError where the model has neither. The cache is taken as it is: begin with a fresh engine.
    """
    if engine.neurons is not None:
        with _neurons(engine, engine.neurons, path) as writer:
            yield writer
        return
    cache = engine.experts
    if cache is None:
        raise _nothing_to_trace(engine)
    records = {layer: len(spans) for layer, spans in cache.spans.items()}
    sizes = {layer: max(span.nbytes for span in spans) for layer, spans in cache.spans.items()}
    about = {
        "model": engine.model.describe()["name"],
        "experts_per_token": engine.config.moe.num_experts_per_tok if engine.config.moe else 0,
        "policy": cache.policy.name,
        "slots": cache.policy.capacity,
        "filled": engine.plan.everything_fits,
    }
    with open_trace(path) as out:
        cache.trace = TraceWriter(out, "experts", records, sizes, **about)
        try:
            yield cache.trace
        finally:
            cache.trace = None


def _nothing_to_trace(engine: Engine) -> UsageError:
    name = engine.model.name
    if engine.run.exact and engine.model.sparsity is not None:
        return UsageError(
            f"With --exact '{name}' asks for all neurons: there is nothing to trace.", "Leave --exact out."
        )
    return UsageError(
        f"'{name}' has no experts and no predictors of neurons, so there is nothing to trace.",
        "Leave --trace out, or calibrate the bundle first.",
    )


@contextmanager
def _neurons(engine: Engine, cache: NeuronCache | Pinned, path: Path) -> Iterator[TraceWriter]:
    records = {layer: found.count for layer, found in engine.neuron_records.items()}
    sizes = {layer: found.width_bytes for layer, found in engine.neuron_records.items()}
    about = {
        "model": engine.model.describe()["name"],
        "policy": engine.run.neuron_policy,
        "window": engine.run.window or NEURON_WINDOW,
        "wants": engine.neuron_wants,
        "filled": isinstance(cache, Pinned),
        "room": cache.room if isinstance(cache, NeuronCache) else records,
        "prompt_room": cache.prompt_room if isinstance(cache, NeuronCache) else records,
    }
    with open_trace(path) as out:
        cache.trace = TraceWriter(out, "neurons", records, sizes, **about)
        try:
            yield cache.trace
        finally:
            cache.trace = None


def record_request(engine: Engine, writer: TraceWriter) -> int:
    """Bytes of a request by which the run read records, on average while it decoded; where it read none, those of a
    record as far as one request goes."""
    rows = [row for row in engine.report().io if row["phase"] == "decode" and row["kind"] in RECORD_READS]
    requests = sum(row["requests"] for row in rows)
    if requests:
        return -(-sum(row["bytes"] for row in rows) // requests)
    return min(max(writer.record_bytes.values()), engine.reading.request_bytes)


def measured(engine: Engine, writer: TraceWriter, records: DriveRate, others: DriveRate) -> Measured | None:
    """What the run has counted and measured; None where it has decoded nothing. `records` and `others` are what the
    drive gives by itself: with requests of `record_request`, and of slices."""
    report, request = engine.report(), record_request(engine, writer)
    decode = report.decode
    seconds = decode.seconds - writer.seconds["decode"]
    if not decode.tokens or seconds <= 0:
        return None
    other = sum(row["bytes"] for row in report.io if row["phase"] == "decode" and row["kind"] not in RECORD_READS)
    hits, misses = _counted(engine)
    streamed, plans = planned_budgets(engine)
    return Measured(
        tokens=decode.tokens,
        passes=decode.passes,
        hits=hits,
        misses=misses,
        seconds=seconds,
        wait_seconds=decode.wait_seconds,
        read_seconds=decode.read_seconds,
        other_bytes=other,
        # measured with whole blocks: a request takes as long, and brings what it brings
        record_rate=records.bytes_per_second * min(1.0, request / records.request_bytes),
        other_rate=others.bytes_per_second,
        memory=engine.plan.budget,
        context=engine.run.context or engine.plan.context,
        streamed=streamed,
        plans=plans,
    )


def _counted(engine: Engine) -> tuple[int, int]:
    """Hits and misses of records while decoding, as the caches counted them. (Reports count slices with them.)"""
    if isinstance(engine.neurons, NeuronCache):
        policies = [layer.policy for layer in engine.neurons.layers.values()]
        return sum(policy.hits for policy in policies), sum(policy.misses for policy in policies)
    if engine.neurons is None and engine.experts is not None:
        return engine.experts.policy.hits(), engine.experts.policy.misses()
    counts = engine.recorder.neuron_counts.items()
    return sum(computed for (phase, _), (computed, _) in counts if phase == "decode"), 0
