"""What skipping neurons would bring a model whose activation leaves none at zero (SiLU, GELU): measured, not assumed.

Several ways to say which neurons matter for a token run through the model side by side, each at several densities; the
model passes once, a layer at a time. Thresholds are set on calibration tokens, perplexity is of held-out ones.

    product     |act(gate) up| times the length of the down column, from the weights themselves: the bound, no saving
    shadow      the same from int4 copies of gate and up that stay in memory; whole records are read
    low-rank    the same from the best maps of rank d/4 for gate and up, which would stay in 8 bits (2312.11514 has such
                a map for the sign of the gate)
    gate        |act(gate)|, the gate staying in memory (CATS, 2404.08763); up and down are read
    static      the neurons that mattered most on the calibration tokens, always the same

What a way reads a token comes from running its demands through a neuron cache of what memory is left beside its copies;
how long that takes from reading what some of these tokens missed, neighbours together, as runs read neurons.
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
from ..store.drive import measure, measure_records
from .predictors import Whitened

KINDS = ("product", "shadow", "low-rank", "gate", "static")
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
MEMORY = (0.5, 0.25)  # of the FFN weights
WINDOW = 512
WARM = 64  # tokens whose misses do not count: the slots still fill
LOW_RANK = 4  # the width of the model over the rank of its maps
TAUGHT = 0.75  # of the calibration tokens: what the maps of low rank are made from; the rest sets thresholds
SAMPLES = 8  # layers whose misses are read, to time it
SECTOR = 512  # records are padded to it
Progress = Callable[[int, int, str], None]
Asked = dict[tuple[str, float, float], list[np.ndarray]]  # kind, density, memory -> a layer each, ids that were missed


@dataclass
class Way:
    """One kind at one density. By share of memory: `misses` are neurons read a token, as a share of all, `seconds` what
    reading them takes."""

    kind: str
    density: float
    resident: float = 0.0  # copies that stay, as a share of the FFN
    fetched: float = 1.0  # of a neuron's bytes, what is read when it is needed
    perplexity: float = 0.0
    kept: float = 0.0
    misses: dict[float, float] = field(default_factory=dict)
    seconds: dict[float, float] = field(default_factory=dict)

    def bytes(self, memory: float) -> float | None:
        """Read a token, as a share of the FFN; None where what stays does not fit. The product is no way to run."""
        if self.kind == "product" or self.resident > memory:
            return None
        return self.misses[memory] * self.fetched


@dataclass(frozen=True)
class Study:
    """What was found. `best` names a way by (kind, density) for each share of memory; none pays where it is missing."""

    model: str
    tokens: int  # that thresholds are set on
    test_tokens: int
    perplexity: float
    ways: tuple[Way, ...]
    max_increase: float
    ffn_bytes: int
    slice_rate: float  # bytes a second
    best: dict[float, tuple[str, float]]

    def seconds(self, way: Way | None, memory: float) -> float | None:
        """Of reading, a token; without a way, of plain streaming."""
        if way is None:
            return (1 - memory) * self.ffn_bytes / self.slice_rate
        return None if way.bytes(memory) is None else way.seconds[memory]

    def rate(self, way: Way, memory: float) -> float:
        """Bytes a second at which a way's neurons come."""
        return (way.bytes(memory) or 0.0) * self.ffn_bytes / max(way.seconds[memory], 1e-9)

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
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
        asked: Asked = {}
        tested = [decoder.embedding(torch.tensor(test), rt) * scale for _ in ways]
        for index, block in enumerate(decoder.blocks):
            if progress is not None:
                progress(index, len(decoder.blocks), "measuring what neurons matter")
            assert isinstance(block.ffn, DenseFfn | RecordFfn)
            with rt.feed.hold(decoder.slices_of(index)):
                layer = _Layer(block.ffn, engine, sampled=index % max(1, len(decoder.blocks) // SAMPLES) == 0)
                for number, x in enumerate(states):
                    kv.trim(0)
                    states[number] = replace(block, ffn=layer.watching)(x, kv, len(x), rt)  # type: ignore[arg-type]
                layer.settle(ways)
                layer.asked = asked
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
    rate = measure(file).bytes_per_second
    for way in ways[1:]:
        width = -(-int(way.fetched * layer.neuron_bytes) // SECTOR) * SECTOR
        for share in MEMORY if way.kind != "product" else ():
            way.seconds[share] = count * measure_records(file, width, asked[way.kind, way.density, share])
    found = Study(
        opened.name, sum(map(len, learn)), len(test), ways[0].perplexity, tuple(ways[1:]), max_increase,
        layer.neuron_bytes * layer.count * count, rate, {},
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

    def __init__(self, ffn: DenseFfn | RecordFfn, engine: Engine, sampled: bool) -> None:
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
        shadow = 2 * format_bytes(fmt, d) / self.neuron_bytes
        self.rank = max(1, d // LOW_RANK)
        low = 2 * self.rank * (d + self.count) * 34 / 32 / (self.neuron_bytes * self.count)
        self.resident = {"shadow": shadow, "low-rank": low, "gate": 1 / 3}
        self.maps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.sampled = sampled
        self.asked: Asked = {}
        self.seen: list[torch.Tensor] = []
        self.worth = torch.zeros(self.count)  # sum of the product over tokens
        self.bounds: dict[tuple[str, float], float | torch.Tensor] = {}

    def _hidden(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._biased(x @ gate.T, x @ up.T)

    def _biased(self, g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(act(gate), up) of products with the rows alone."""
        g = g if self.gate_bias is None else g + self.gate_bias
        u = u if self.up_bias is None else u + self.up_bias
        return self.act(g), u

    def _scores(self, kind: str, x: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, d_ff]: what the kind looks at; `exact` is what the weights themselves give."""
        if kind == "gate":
            return exact[0].abs()
        if kind == "low-rank":
            g, u = self._biased(*(x @ a.T @ b.T for a, b in self.maps))
        else:
            g, u = self._hidden(x, *self.shadow) if kind == "shadow" else exact
        return (g * u).abs_().mul_(self.length)

    def _out(self, h: torch.Tensor) -> torch.Tensor:
        out = h @ self.down
        return out if self.down_bias is None else out + self.down_bias

    def watching(self, x: torch.Tensor, rt: Any) -> torch.Tensor:
        """The layer as it is; its inputs are kept."""
        self.seen.append(x)
        g, u = self._hidden(x, self.gate, self.up)
        self.worth += self._scores("product", x, (g, u)).sum(0)
        return self._out(g * u)

    def settle(self, ways: list[Way]) -> None:
        """Set thresholds, and the static set, on what was seen."""
        x = torch.cat(self.seen)
        taught = int(TAUGHT * len(x))
        self.maps = [Whitened(x[:taught], m, self.rank).of_rank(self.rank) for m in (self.gate, self.up)]
        x = x[taught:]
        exact, step = self._hidden(x, self.gate, self.up), max(1, len(x) // 512)
        for kind in KINDS:
            scores = self.worth if kind == "static" else self._scores(kind, x, exact)
            flat = scores.flatten().numpy()[:: 1 if kind == "static" else step]
            for way in ways:
                if way.kind == kind:
                    place = min(len(flat) - 1, int((1 - way.density) * len(flat)))
                    bound = float(np.partition(flat, place)[place])
                    self.bounds[kind, way.density] = scores >= bound if kind == "static" else bound
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
                kept = self._scores(way.kind, x, (g, u)) >= bound
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
                missing, _ = policy.demand(np.flatnonzero(row), counted=token >= WARM)
            if self.sampled:  # the last token's
                self.asked.setdefault((way.kind, way.density, share), []).append(missing)
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
