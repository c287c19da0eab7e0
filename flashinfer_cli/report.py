"""What a run cost: a frozen reading of the recorder's counters, and of the plan beside them. Renders nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .config import RunConfig, format_size
from .recorder import PHASES, PhaseName, Recorder, Step

__all__ = [
    "PHASES", "PhaseReport", "PlanPart", "Recorder", "RunReport", "Step", "expert_cache", "expert_rows", "io_rows",
    "label", "layer_rows", "phase_report", "readings",
]  # fmt: skip


@dataclass(frozen=True)
class PlanPart:
    """One row of the memory plan, in bytes. `actual` is None where it cannot be told apart from its neighbours."""

    part: str
    planned: int
    actual: int | None = None
    note: str = ""


@dataclass(frozen=True)
class PhaseReport:
    tokens: int
    passes: int
    seconds: float
    tokens_per_second: float
    wait_seconds: float
    compute_seconds: float
    other_seconds: float
    bytes_read: int
    bytes_per_token: float
    requests: int
    read_seconds: float
    read_bytes_per_second: float  # while a read was under way
    overlap: float  # share of the reading time that did not stall the computation
    hits: int
    misses: int
    neurons: float | None = None  # share of the neurons of layers with predictors that a token computed
    skipped: float | None = None  # share of a token's visits to Mixture-of-Depths blocks that computed nothing

    @property
    def hit_ratio(self) -> float | None:
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


@dataclass(frozen=True)
class RunReport:
    """The whole account of a run. Sizes are bytes, times seconds."""

    model: dict[str, Any]  # name, path, kind, model_type, parameters, weight_bytes, formats
    exactness: str  # exact | quantized | sparse | degraded
    device: str
    kernels: str
    threads: int
    direct_io: str  # "direct", or "buffered" and why
    budget: int
    peak: int
    least: int
    plan: tuple[PlanPart, ...]
    resident_bytes: int  # weights that stay
    streamed_bytes: int  # weights that come from flash for every token of a dense model, or may for an MoE
    load: PhaseReport
    prefill: PhaseReport
    decode: PhaseReport
    layers: tuple[dict[str, Any], ...]  # layer, prefill_wait, prefill_compute, decode_wait, decode_compute
    io: tuple[dict[str, Any], ...]  # phase, kind, requests, bytes, useful
    request_sizes: dict[int, int]
    steps: tuple[Step, ...]
    wasted_bytes: int
    first_token_seconds: float | None
    experts: tuple[dict[str, Any], ...] = ()  # by phase and layer: `expert_rows`
    expert_cache: dict[str, Any] | None = None  # policy, slots, slot_bytes, transit, prefetch and its verdict, bias
    speculation: dict[str, Any] | None = None  # draft, acceptance, tokens_per_pass, ...: decoding.speculative
    drive: dict[str, Any] | None = None  # request_bytes, depth, bytes_per_second: measured in place
    # Of a sparse run what calibration measured: perplexity, dense_perplexity, perplexity_increase, top1_agreement.
    quality: dict[str, float] | None = None
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        out = asdict(self)
        for phase in PHASES:
            out[phase]["hit_ratio"] = getattr(self, phase).hit_ratio
        return out

    def summary(self) -> str:
        """The one line that ends every run."""
        decode = self.decode
        parts = [f"{decode.tokens + (1 if self.first_token_seconds is not None else 0)} tokens"]
        if self.prefill.tokens:
            parts.append(f"prefill {self.prefill.tokens_per_second:.1f} tok/s")
        if decode.tokens:
            parts.append(f"decode {decode.tokens_per_second:.2f} tok/s")
            parts.append(f"{format_size(decode.bytes_per_token)} read a token")
        rate = decode if decode.bytes_read else self.prefill
        if rate.bytes_read:
            parts.append(f"{rate.read_bytes_per_second / 1e9:.2f} GB/s")
        if decode.hit_ratio is not None:
            parts.append(f"hits {decode.hit_ratio:.0%}")
        if self.speculation is not None:
            said = self.speculation
            parts.append(f"drafts: {said['acceptance']:.0%} stand, {said['tokens_per_pass']:.1f} tokens a pass")
        if decode.neurons is not None:
            parts.append(f"{decode.neurons:.1%} of neurons")
        if decode.skipped is not None:
            parts.append(f"skipped {decode.skipped:.0%} of block visits")
        parts.append(f"peak {format_size(self.peak)} of {format_size(self.budget)}")
        parts.append(label(self.exactness, self.quality))
        return " · ".join(parts)


def label(exactness: str, quality: Mapping[str, float] | None) -> str:
    """A run's label with the quality that was measured: "sparse (+0.02% perplexity, 99.4% the same first choice)"."""
    if not quality:
        return exactness
    increase, agreement = quality["perplexity_increase"], quality["top1_agreement"]
    return f"{exactness} ({increase:+.2%} perplexity, {agreement:.1%} the same first choice)"


def readings(recorder: Recorder) -> dict[str, Any]:
    """The fields of a RunReport that counters fill."""
    return {
        **{phase: phase_report(recorder, phase) for phase in PHASES},
        "layers": layer_rows(recorder),
        "io": io_rows(recorder),
        "request_sizes": dict(sorted(recorder.sizes.items())),
        "steps": tuple(recorder.steps),
        "wasted_bytes": recorder.wasted_bytes,
        "experts": expert_rows(recorder),
    }


def phase_report(recorder: Recorder, phase: PhaseName) -> PhaseReport:
    """Read a phase out of the counters."""
    count = recorder.phases[phase]
    reads = [io for (name, _), io in recorder.reads.items() if name == phase]
    nbytes, requests = sum(io.bytes for io in reads), sum(io.requests for io in reads)
    return PhaseReport(
        tokens=count.tokens,
        passes=count.passes,
        seconds=count.seconds,
        tokens_per_second=count.tokens / count.seconds if count.seconds else 0.0,
        wait_seconds=count.wait_seconds,
        compute_seconds=count.compute_seconds,
        other_seconds=max(0.0, count.seconds - count.wait_seconds - count.compute_seconds),
        bytes_read=nbytes,
        bytes_per_token=nbytes / count.tokens if count.tokens else 0.0,
        requests=requests,
        read_seconds=count.read_seconds,
        read_bytes_per_second=nbytes / count.read_seconds if count.read_seconds else 0.0,
        overlap=max(0.0, 1 - count.wait_seconds / count.read_seconds) if count.read_seconds else 0.0,
        hits=count.hits,
        misses=count.misses,
        neurons=_neurons(recorder, phase),
        skipped=count.skipped / count.skippable if count.skippable else None,
    )


def _neurons(recorder: Recorder, phase: str) -> float | None:
    counts = [count for (name, _), count in recorder.neuron_counts.items() if name == phase]
    total = sum(of for _, of in counts)
    return sum(computed for computed, _ in counts) / total if total else None


def layer_rows(recorder: Recorder) -> tuple[dict[str, Any], ...]:
    """Waiting and computing by layer, prefill apart from decode."""
    rows = []
    for layer in sorted({layer for _, layer in recorder.layers}):
        row: dict[str, Any] = {"layer": layer}
        for phase in ("prefill", "decode"):
            wait, compute = recorder.layers.get((phase, layer), (0.0, 0.0))
            row |= {f"{phase}_wait": wait, f"{phase}_compute": compute}
        rows.append(row)
    return tuple(rows)


def expert_rows(recorder: Recorder) -> tuple[dict[str, Any], ...]:
    """Experts by phase and layer. `recall` is the share of those needed that were among as many guesses."""
    return tuple(
        {
            "phase": phase, "layer": layer, "hits": count.hits, "misses": count.misses,
            "guessed": count.guessed, "right": count.right, "wasted_bytes": count.wasted_bytes,
            "degraded": count.degraded,
            "recall": {ahead: found / of for ahead, (found, of) in sorted(count.recall.items()) if of},
            "uses": dict(sorted(count.uses.items())),
        }
        for (phase, layer), count in sorted(recorder.expert_counts.items())
        if phase != "load"
    )  # fmt: skip


def expert_cache(cache: Any, run: RunConfig) -> dict[str, Any]:
    """The settings of an expert cache (`cache.experts`) as they came to be, and those of the run that touch it."""
    return {
        "policy": cache.policy.name, "follows": cache.policy.follows,
        "slots": cache.policy.capacity, "experts": cache.policy.total,
        "transit": cache.slots - cache.policy.capacity, "slot_bytes": cache.slot_bytes,
        "prefetch": cache.guessing.verdict(), "lookahead": cache.lookahead, "cache_bias": run.cache_bias,
        "cache_gap": run.cache_gap, "degrade": run.degrade,
    }  # fmt: skip


def io_rows(recorder: Recorder) -> tuple[dict[str, Any], ...]:
    """Reads by phase and kind."""
    return tuple(
        {"phase": phase, "kind": kind, "requests": io.requests, "bytes": io.bytes, "useful": io.useful}
        for (phase, kind), io in sorted(recorder.reads.items())
    )
