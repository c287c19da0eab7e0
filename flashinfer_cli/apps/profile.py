"""Run a prompt and account for it: memory against plan, reads against the drive, time against what it was spent on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from ..cache.neurons import NeuronCache
from ..config import SamplingParams
from ..device import release_free_memory
from ..engine import Engine
from ..report import RunReport
from ..store.drive import measure


def profile(
    engine: Engine,
    prompt: str | Sequence[int],
    sampling: SamplingParams,
    progress: Callable[[int, int, str], None] | None = None,
) -> RunReport:
    """Generate from `prompt`, then measure the drive with requests of the size and depth that the run used."""
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
    rate = measure(largest, request_bytes=engine.reading.request_bytes, depth=engine.store.threads)
    engine.drive = asdict(rate)
    return engine.report()
