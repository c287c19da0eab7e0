"""Record which experts or neurons every token of a run asks for, for `replay`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cache.neurons import NeuronCache
from ..cache.pinned import Pinned
from ..cache.trace import TraceWriter, open_trace
from ..config import NEURON_WINDOW
from ..engine import Engine
from ..errors import UsageError


@contextmanager
def recording(engine: Engine, path: Path) -> Iterator[None]:
    """Write what the engine's experts are asked for, and the guesses of it, into `path` while the block runs; of a
    calibrated model the neurons.

    Raises UsageError where the model has neither. The cache is taken as it is: begin with a fresh engine.
    """
    if engine.neurons is not None:
        with _neurons(engine, engine.neurons, path):
            yield
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
            yield
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
def _neurons(engine: Engine, cache: NeuronCache | Pinned, path: Path) -> Iterator[None]:
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
            yield
        finally:
            cache.trace = None
