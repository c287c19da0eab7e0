"""Run a prompt and account for it: memory against plan, reads against the drive, time against what it was spent on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from ..cache.neurons import NeuronCache
from ..cache.trace import TraceWriter
from ..config import SamplingParams
from ..device import release_free_memory
from ..engine import Engine
from ..report import RunReport
from ..store.drive import measure
from .recording import measured, record_request, recording

CLOSE = 0.9  # of a request's size: one as large is read at the same rate
RECORD_SECONDS = 0.5  # of measuring the drive with requests of records


def profile(
    engine: Engine,
    prompt: str | Sequence[int],
    sampling: SamplingParams,
    progress: Callable[[int, int, str], None] | None = None,
    trace: Path | None = None,
) -> RunReport:
    """Generate from `prompt`, then measure the drive with requests of the size and depth that the run used.

    Into `trace` goes what every token asked for, and what the run measured, for `replay`; UsageError where the model
    has nothing to trace.
    """
    opened: AbstractContextManager[TraceWriter | None] = nullcontext() if trace is None else recording(engine, trace)
    with opened as writer:
        total = sampling.max_tokens or 0
        for event in engine.generate(prompt, sampling):
            if progress is not None:
                progress(event.index + 1, total, "generating")
        if isinstance(engine.neurons, NeuronCache):  # measuring takes memory too: what a prompt would take
            engine.neurons.have(False)
        release_free_memory()
        files = engine.checkpoint.files
        largest = max(files, key=lambda path: path.stat().st_size)
        if progress is not None:
            progress(0, 0, "measuring the drive")
        request, depth = engine.reading.request_bytes, engine.store.threads
        rate = measure(largest, request_bytes=request, depth=depth)
        engine.drive = asdict(rate)
        if writer is not None:
            by_record, records = record_request(engine, writer), rate
            if by_record < CLOSE * request:
                records = measure(largest, request_bytes=by_record, depth=depth, seconds=RECORD_SECONDS)
            found = measured(engine, writer, records, rate)
            if found is not None:
                writer.end(found)
    return engine.report()
