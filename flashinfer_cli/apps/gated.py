"""What skipping neurons would bring a model whose activation leaves none at zero (SiLU, GELU): measured, not assumed.

Several ways to say which neurons matter for a token run through the model side by side, each at several densities; the
model passes once, a layer at a time. Thresholds are set on calibration tokens, perplexity is of held-out ones.

    product     |act(gate) up| times the length of the down column, from the weights themselves: the bound, no saving
    shadow      the same from int4 copies of gate and up that stay in memory; whole records are read
    gate        |act(gate)|, the gate staying in memory (CATS, 2404.08763); up and down are read
    static      the neurons that mattered most on the calibration tokens, always the same

What a way reads a token comes from running its demands through a neuron cache of what memory is left beside its copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bundles.format import format_bytes
from ..bundles.quantize import format_of, quantize
from ..cache.kv import KVCache
from ..cache.window import Recent
from ..config import RunConfig
from ..engine import Engine
from ..errors import UnsupportedModelError, UsageError
from ..kernels.activations import ACTIVATIONS
from ..layers.ffn import DenseFfn, RecordFfn
from ..models.open import open_model
from ..store.drive import measure

KINDS = ("product", "shadow", "gate", "static")
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
MEMORY = (0.5, 0.25)  # of the FFN weights
WINDOW = 512
WARM = 64  # tokens whose misses do not count: the slots still fill
Progress = Callable[[int, int, str], None]


@dataclass
class Way:
    """One kind at one density. `misses` by share of memory: neurons read a token, as a share of all."""

    kind: str
    density: float
    resident: float = 0.0  # copies that stay, as a share of the FFN
    fetched: float = 1.0  # of a neuron's bytes, what is read when it is needed
    perplexity: float = 0.0
    kept: float = 0.0
    misses: dict[float, float] = field(default_factory=dict)

    def bytes(self, memory: float) -> float | None:
        """Read a token, as a share of the FFN; None where what stays does not fit. The product is no way to run."""
        if self.kind == "product" or self.resident > memory:
            return None
        return self.misses[memory] * self.fetched


@dataclass(frozen=True)
class Study:
    """What was found. `best` names a way by (kind, density) for each share of memory; none pays where it is missing."""

    model: str
    perplexity: float
    ways: tuple[Way, ...]
    max_increase: float
    ffn_bytes: int
    record_rate: float  # bytes a second, reads of a neuron each
    slice_rate: float
    best: dict[float, tuple[str, float]]

    def seconds(self, way: Way | None, memory: float) -> float | None:
        """Of reading, a token; without a way, of plain streaming."""
        if way is None:
            return (1 - memory) * self.ffn_bytes / self.slice_rate
        share = way.bytes(memory)
        return None if share is None else share * self.ffn_bytes / self.record_rate

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for row, way in zip(found["ways"], self.ways, strict=True):
            row["seconds"] = {share: self.seconds(way, share) for share in MEMORY}
        return found | {"plain_seconds": {share: self.seconds(None, share) for share in MEMORY}}


def applies(model: str | Path) -> bool:
    """Is it a dense model with a gate, whose activation leaves no zeros?"""
    config = open_model(model).config
    return config.gated and config.moe is None and config.mod is None and config.hidden_act not in ("relu", "relu2")


def study(
    model: str | Path,
    text: str,
    run: RunConfig,
    *,
    tokens: int = 2048,
    test_tokens: int = 512,
    max_increase: float = 0.01,
    progress: Progress | None = None,
) -> Study:
    """Measure every way on a model with a gated FFN. Raises UnsupportedModelError, UsageError for too little text."""
    opened = open_model(model)
    config = opened.config
    if not config.gated or config.moe is not None or config.mod is not None:
        raise UnsupportedModelError("Only dense layers with a gate can be studied so.")
    ids = opened.tokenizer.encode(text)
    if len(ids) < tokens + test_tokens:
        raise UsageError(
            f"The text is {len(ids):,} tokens; {tokens + test_tokens:,} are needed.", "Give a longer text with --text."
        )
    learn = [ids[i : i + WINDOW] for i in range(0, tokens, WINDOW)]
    test = ids[tokens : tokens + test_tokens]
    ways = [Way("dense", 1.0)] + [Way(kind, density) for kind in KINDS for density in DENSITIES]
    settled = replace(run, exact=True, context=WINDOW, prefill_chunk=WINDOW, logit_rows=64)
    with Engine(opened, settled) as engine, torch.inference_mode():
        decoder, rt = engine.decoder, engine.decoder.rt
        kv = KVCache(config, WINDOW, engine.device.name)
        scale = config.embedding_scale
        states = [decoder.embedding(torch.tensor(w), rt) * scale for w in learn]
        tested = [decoder.embedding(torch.tensor(test), rt) * scale for _ in ways]
        for index, block in enumerate(decoder.blocks):
            if progress is not None:
                progress(index, len(decoder.blocks), "measuring what neurons matter")
            assert isinstance(block.ffn, DenseFfn | RecordFfn)
            with rt.feed.hold(decoder.slices_of(index)):
                layer = _Layer(block.ffn, engine, index)
                for number, x in enumerate(states):
                    kv.trim(0)
                    states[number] = replace(block, ffn=layer.watching)(x, kv, len(x), rt)  # type: ignore[arg-type]
                layer.settle(ways)
                for number, way in enumerate(ways):
                    kv.trim(0)
                    ffn = layer.skipping(way)
                    tested[number] = replace(block, ffn=ffn)(tested[number], kv, len(test), rt)  # type: ignore[arg-type]
        with rt.feed.hold(decoder.head.slices):
            for way, x in zip(ways, tested, strict=True):
                way.perplexity = _perplexity(engine, x, test)
        count, files = len(decoder.blocks), opened.checkpoint.files
        for way in ways:
            way.kept /= count
            way.misses = {share: missed / count for share, missed in way.misses.items()}
    file = max(files, key=lambda path: path.stat().st_size)
    width = max(4096, layer.neuron_bytes)
    found = Study(
        opened.name, ways[0].perplexity, tuple(ways[1:]), max_increase, layer.neuron_bytes * layer.count * count,
        measure(file, request_bytes=width, depth=16).bytes_per_second, measure(file).bytes_per_second, {},
    )  # fmt: skip
    return replace(found, best=_best(found))


def _best(found: Study) -> dict[float, tuple[str, float]]:
    best: dict[float, tuple[str, float]] = {}
    for share in MEMORY:
        quickest = found.seconds(None, share) or math.inf
        for way in found.ways:
            seconds = found.seconds(way, share)
            good = way.perplexity <= found.perplexity * (1 + found.max_increase)
            if good and seconds is not None and seconds < quickest:
                quickest, best[share] = seconds, (way.kind, way.density)
    return best


def _perplexity(engine: Engine, x: torch.Tensor, ids: list[int]) -> float:
    decoder, config, nats = engine.decoder, engine.config, 0.0
    if decoder.final_norm is not None:
        x = decoder.final_norm(x)
    for first in range(0, len(ids) - 1, 64):
        logits = decoder.head(x[first : first + 64].contiguous(), decoder.rt) * config.logit_scale
        if config.final_logit_softcap:
            logits = (logits / config.final_logit_softcap).tanh() * config.final_logit_softcap
        targets = torch.tensor(ids[first + 1 : first + 65])
        nats -= float(logits.log_softmax(-1)[: len(targets)].gather(1, targets[:, None]).sum())
    return math.exp(nats / (len(ids) - 1))


class _Layer:
    """One layer's FFN in float32, its int4 shadow, and what calibration tokens make of it."""

    def __init__(self, ffn: DenseFfn | RecordFfn, engine: Engine, index: int) -> None:
        self.gate, self.up, self.down, self.neuron_bytes = _matrices(ffn, engine)  # down by neuron: [d_ff, d]
        self.count = len(self.gate)
        self.act = ACTIVATIONS[engine.config.hidden_act]
        self.gate_bias = ffn.gate_bias if isinstance(ffn, RecordFfn) else ffn.gate.bias if ffn.gate else None
        self.up_bias = ffn.up_bias if isinstance(ffn, RecordFfn) else ffn.up.bias
        self.down_bias = ffn.down_bias if isinstance(ffn, RecordFfn) else ffn.down.bias
        self.length = self.down.norm(dim=1)
        d = self.gate.shape[1]
        fmt = format_of("int4", d)
        if fmt is None:
            raise UnsupportedModelError(f"Rows of {d} elements cannot become int4.")
        self.shadow = [
            engine.kernels.dequantize(torch.from_numpy(quantize(m.numpy(), fmt, "nearest")), fmt, d).clone()
            for m in (self.gate, self.up)
        ]
        self.resident = {"shadow": 2 * format_bytes(fmt, d) / self.neuron_bytes, "gate": 1 / 3}
        self.seen: list[torch.Tensor] = []
        self.bounds: dict[tuple[str, float], float | torch.Tensor] = {}

    def _hidden(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, u = x @ gate.T, x @ up.T
        g = g if self.gate_bias is None else g + self.gate_bias
        u = u if self.up_bias is None else u + self.up_bias
        return self.act(g), u

    def _scores(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        """[T, d_ff]: what the kind looks at."""
        if kind == "gate":
            return self._hidden(x, self.gate, self.up)[0].abs()
        g, u = self._hidden(x, *self.shadow) if kind == "shadow" else self._hidden(x, self.gate, self.up)
        return (g * u).abs_().mul_(self.length)

    def _out(self, h: torch.Tensor) -> torch.Tensor:
        out = h @ self.down
        return out if self.down_bias is None else out + self.down_bias

    def watching(self, x: torch.Tensor, rt: Any) -> torch.Tensor:
        """The layer as it is; its inputs are kept."""
        self.seen.append(x)
        g, u = self._hidden(x, self.gate, self.up)
        return self._out(g * u)

    def settle(self, ways: list[Way]) -> None:
        """Set thresholds, and the static set, on what was seen."""
        x = torch.cat(self.seen)
        for kind in KINDS:
            scores = self._scores("product" if kind == "static" else kind, x)
            flat = scores.mean(0).numpy() if kind == "static" else scores.flatten().numpy()[:: max(1, len(x) // 512)]
            for way in ways:
                if way.kind == kind:
                    place = min(len(flat) - 1, int((1 - way.density) * len(flat)))
                    bound = float(np.partition(flat, place)[place])
                    self.bounds[kind, way.density] = scores.mean(0) >= bound if kind == "static" else bound
        self.seen.clear()

    def skipping(self, way: Way) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """The layer without the neurons that the way says do not matter; the way keeps count."""

        def run(x: torch.Tensor, rt: Any) -> torch.Tensor:
            g, u = self._hidden(x, self.gate, self.up)
            if way.kind == "dense":
                return self._out(g * u)
            bound = self.bounds[way.kind, way.density]
            if isinstance(bound, torch.Tensor):
                kept = bound.expand(len(x), -1)
            else:
                kept = self._scores(way.kind, x) >= bound
            self._account(way, kept.numpy())
            return self._out(g * u * kept)

        return run

    def _account(self, way: Way, kept: np.ndarray) -> None:
        way.kept += float(kept.mean())
        way.resident = self.resident.get(way.kind, 0.0)
        way.fetched = 2 / 3 if way.kind == "gate" else 1.0
        for share in MEMORY:
            room = max(0.0, share - way.resident) / way.fetched
            policy = Recent(self.count, int(min(1.0, room) * self.count))
            for token, row in enumerate(kept):
                policy.demand(np.flatnonzero(row), counted=token >= WARM)
            missed = policy.misses / (len(kept) - WARM) / self.count
            way.misses[share] = way.misses.get(share, 0.0) + missed


def _matrices(ffn: DenseFfn | RecordFfn, engine: Engine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(gate, up, down by neuron) float32 [d_ff, d] and the bytes of a neuron as it is stored."""
    d, feed, kernels = engine.config.hidden_size, engine.decoder.rt.feed, engine.kernels
    if isinstance(ffn, RecordFfn):
        width, rows = format_bytes(ffn.format, d), []
        for part in ffn.parts:
            with feed.use(part.slice) as data:
                records = data.view(part.rows, -1)
                cut = [records[:, i * width : (i + 1) * width].contiguous() for i in range(3)]
                rows.append([kernels.dequantize(each, ffn.format, d).clone() for each in cut])
        gate, up, down = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return gate, up, down, 3 * width
    found, stored = [], 0
    assert ffn.gate is not None
    for linear in (ffn.gate, ffn.up, ffn.down):
        pieces = []
        for part in linear.parts:
            with feed.use(part.slice) as data:
                stored += data.numel()
                pieces.append(kernels.dequantize(data.view(part.rows, -1), linear.format, linear.cols).clone())
        found.append(torch.cat(pieces))
    return found[0], found[1], found[2].T.contiguous(), stored // len(found[0])
