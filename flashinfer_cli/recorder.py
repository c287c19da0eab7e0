"""What a run costs, counted where it happens: the store, the caches and the engine write here.

Prefill and decode are counted apart, since a prompt's hits and rates say nothing about those of generation.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

PhaseName = Literal["load", "prefill", "decode"]
PHASES: tuple[PhaseName, ...] = ("load", "prefill", "decode")


@dataclass
class IoCount:
    """Reads of one kind in one phase. `useful` bytes were asked for; `bytes` crossed the bus, alignment included."""

    requests: int = 0
    bytes: int = 0
    useful: int = 0


@dataclass
class PhaseCount:
    """Totals of a phase; seconds are wall time of the computing thread, `read_seconds` time with a read under way."""

    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    read_seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    skippable: int = 0  # tokens that came to a block they may skip
    skipped: int = 0


@dataclass
class ExpertCount:
    """What happened to a layer's experts in one phase. `recall` counts by how many layers ahead a guess was made."""

    hits: int = 0
    misses: int = 0
    guessed: int = 0  # reads ahead of need that have been settled
    right: int = 0  # of these, experts that were then needed
    wasted_bytes: int = 0
    degraded: int = 0  # served from small copies; neither hits nor misses
    uses: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # expert -> passes that needed it
    recall: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))  # ahead -> [named, of]


@dataclass(frozen=True)
class Step:
    """One pass of the decode loop: the first few are cold, the rest warm."""

    seconds: float
    wait_seconds: float
    bytes_read: int


class _Computing:
    """`Recorder.computing`; a class, since some five hundred a token make a generator's cost felt."""

    __slots__ = ("recorder", "start")

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.recorder._add(1, time.perf_counter() - self.start)


class Recorder:
    """The counters of one engine. I/O threads call `io` and `busy`; all else is called by the computing thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.phase: PhaseName = "load"
        self.phases: dict[str, PhaseCount] = {name: PhaseCount() for name in PHASES}
        self.reads: dict[tuple[str, str], IoCount] = defaultdict(IoCount)
        self._sizes: Counter[int] = Counter()  # bytes of a request -> count
        self.by_bits: list[Iterable[int]] = []  # requests counted by compiled code, by the bits of their bytes
        self.layers: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])  # -> [wait, compute]
        self.neuron_counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])  # -> [computed, of]
        self.neuron_guesses = [0, 0]  # read ahead of need, of these needed
        self.expert_counts: dict[tuple[str, int], ExpertCount] = defaultdict(ExpertCount)
        self.steps: list[Step] = []
        self.layer = -1  # -1 embedding, 0.. the layers, num_hidden_layers the head
        self.wasted_bytes = 0  # read ahead of need and never used

    # ---- I/O threads
    def io(self, kind: str, sizes: Sequence[int], useful: int) -> None:
        """Count a batch of read requests that has ended: the bytes of each, and how many of all were asked for."""
        with self._lock:
            count = self.reads[self.phase, kind]
            count.requests += len(sizes)
            count.bytes += sum(sizes)
            count.useful += useful
            self._sizes.update(sizes)

    @property
    def sizes(self) -> dict[int, int]:
        """Requests by their bytes, rounded up to a power of two."""
        found: dict[int, int] = defaultdict(int)
        with self._lock:
            for size, many in self._sizes.items():
                found[1 << max(size - 1, 1).bit_length()] += many
        for counts in self.by_bits:
            for bits, many in enumerate(counts):
                if many:
                    found[1 << bits] += int(many)
        return found

    def read_by_code(self, kind: str, requests: int, nbytes: int, useful: int) -> None:
        """Count reads that compiled code made, whose sizes are in `by_bits`."""
        with self._lock:
            count = self.reads[self.phase, kind]
            count.requests += requests
            count.bytes += nbytes
            count.useful += useful

    def busy(self, seconds: float) -> None:
        """Add time during which at least one read was under way."""
        with self._lock:
            self.phases[self.phase].read_seconds += seconds

    # ---- the computing thread
    @contextmanager
    def during(self, phase: PhaseName, tokens: int) -> Iterator[None]:
        """One pass of `tokens` tokens through the model."""
        self.phase, start = phase, time.perf_counter()
        count = self.phases[phase]
        before = (count.wait_seconds, self.bytes_read(phase))
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            count.seconds += seconds
            count.tokens += tokens
            count.passes += 1
            if phase == "decode":
                self.steps.append(Step(seconds, count.wait_seconds - before[0], self.bytes_read(phase) - before[1]))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent waiting for bytes."""
        start = time.perf_counter()
        yield
        self._add(0, time.perf_counter() - start)

    def waited(self, seconds: float) -> None:
        """So much of the time spent in kernels was spent waiting for bytes."""
        self._add(0, seconds)
        self._add(1, -seconds)

    def computing(self) -> _Computing:
        """Time spent in kernels."""
        return _Computing(self)

    def _add(self, what: int, seconds: float) -> None:
        count = self.phases[self.phase]
        if what == 0:
            count.wait_seconds += seconds
        else:
            count.compute_seconds += seconds
        self.layers[self.phase, self.layer][what] += seconds

    def cache(self, hits: int, misses: int) -> None:
        count = self.phases[self.phase]
        count.hits += hits
        count.misses += misses

    def neurons(self, layer: int, computed: int, count: int) -> None:
        """A token computed so many of a layer's neurons."""
        total = self.neuron_counts[self.phase, layer]
        total[0] += computed
        total[1] += count

    def neuron_guess(self, read: int, right: int, nbytes: int) -> None:
        """So many neurons were read ahead of need, of which so many were then needed; bytes of one."""
        self.neuron_guesses[0] += read
        self.neuron_guesses[1] += right
        self.wasted_bytes += (read - right) * nbytes

    def experts(self, layer: int, hits: Sequence[int], misses: Sequence[int], named: Mapping[int, list[int]]) -> None:
        """A pass needed these experts of a layer; `named` were guessed, best first, by how many layers ahead."""
        count = self.expert_counts[self.phase, layer]
        count.hits += len(hits)
        count.misses += len(misses)
        needed = {*hits, *misses}
        for expert in needed:
            count.uses[expert] += 1
        for ahead, guessed in named.items():
            recall = count.recall[ahead]
            recall[0] += len(needed.intersection(guessed[: len(needed)]))
            recall[1] += len(needed)

    def degraded(self, layer: int, count: int) -> None:
        """A pass took so many experts of a layer from their small copies."""
        self.expert_counts[self.phase, layer].degraded += count

    def guess(self, layer: int, right: bool, nbytes: int) -> None:
        """A guessed read of a layer's expert has come out right, or wrong and so many bytes were read for nothing."""
        count = self.expert_counts[self.phase, layer]
        count.guessed += 1
        count.right += right
        count.wasted_bytes += nbytes
        self.wasted_bytes += nbytes

    def skips(self, tokens: int, skipped: int) -> None:
        """So many tokens came to a block that may be skipped, and so many of them did."""
        count = self.phases[self.phase]
        count.skippable += tokens
        count.skipped += skipped

    def bytes_read(self, phase: str) -> int:
        with self._lock:
            return sum(count.bytes for (name, _), count in self.reads.items() if name == phase)
