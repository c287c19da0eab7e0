"""Ways to say which neurons of a gated FFN matter for a token, tried on one layer.

product     |act(gate) up| times the length of the down column, from the weights themselves: the bound, no saving
shadow      the same from int4 copies of gate and up that stay in memory; whole records are read
low-rank    the same from the best maps of rank d/4 for gate and up, which would stay in 8 bits (2312.11514 has such
            a map for the sign of the gate)
gate        |act(gate)|, the gate staying in memory (CATS, 2404.08763); up and down are read
static      the neurons that mattered most on the calibration tokens, always the same
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..bundles.format import format_bytes
from ..bundles.quantize import format_of, quantize
from ..cache.window import Recent
from ..engine import Engine
from ..errors import UnsupportedModelError
from ..kernels.activations import ACTIVATIONS
from ..layers.ffn import DenseFfn, RecordFfn
from .predictors import OVERSAMPLE, Whitened

KINDS = ("product", "shadow", "low-rank", "gate", "static")
MEMORY = (0.5, 0.25)  # of the FFN weights
WARM = 64  # tokens whose misses do not count: the slots still fill
LOW_RANK = 4  # the width of the model over the rank of its maps
TAUGHT = 0.75  # of the calibration tokens: what the maps of low rank are made from; the rest sets thresholds
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
    error: float = 0.0  # of the change of perplexity, as a share: one standard error, token by token against dense
    kept: float = 0.0
    misses: dict[float, float] = field(default_factory=dict)
    seconds: dict[float, float] = field(default_factory=dict)

    def bytes(self, memory: float) -> float | None:
        """Read a token, as a share of the FFN; None where what stays does not fit. The product is no way to run."""
        if self.kind == "product" or self.resident > memory:
            return None
        return self.misses[memory] * self.fetched


class StudiedLayer:
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
            engine.kernels.dequantize(torch.from_numpy(quantize(m.numpy(), fmt, "nearest")), fmt, d)
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
        self.kept: list[np.ndarray] = []  # bool [T, d_ff] a window, of the way that runs

    @staticmethod
    def nbytes(d: int, count: int, tokens: int, window: int, test_tokens: int) -> int:
        """What a layer of `count` neurons takes at most: five matrices and the maps, and the largest of what makes a
        shadow, what thresholds are set on, and what a window of tokens becomes."""
        rank, learned = max(1, d // LOW_RANK), tokens - int(TAUGHT * tokens)
        whitened = 32 * d * d + 8 * (d + count) * (rank + OVERSAMPLE)
        settling = 4 * d * tokens + max(whitened, 4 * 6 * learned * count)
        passing = 4 * 6 * window * count + 2 * test_tokens * count
        largest = max(5 * d * count, 4 * d * tokens + max(settling, passing))
        return 5 * 4 * d * count + 8 * rank * (d + count) + largest

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
        self.seen.clear()
        taught = int(TAUGHT * len(x))
        if any(way.kind == "low-rank" for way in ways):
            self.maps = [Whitened(x[:taught], m, self.rank).of_rank(self.rank) for m in (self.gate, self.up)]
        x = x[taught:]
        exact, step = self._hidden(x, self.gate, self.up), max(1, len(x) // 512)
        for kind in KINDS:
            if not any(way.kind == kind for way in ways):
                continue
            scores = self.worth if kind == "static" else self._scores(kind, x, exact)
            flat = scores.flatten().numpy()[:: 1 if kind == "static" else step]
            for way in ways:
                if way.kind == kind:
                    place = min(len(flat) - 1, int((1 - way.density) * len(flat)))
                    bound = float(np.partition(flat, place)[place])
                    self.bounds[kind, way.density] = scores >= bound if kind == "static" else bound

    def skipping(self, way: Way) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """The layer without the neurons that the way says do not matter; they are counted by `account`."""

        def run(x: torch.Tensor, rt: Any) -> torch.Tensor:
            g, u = self._hidden(x, self.gate, self.up)
            if way.kind == "dense":
                return self._out(g * u)
            bound = self.bounds[way.kind, way.density]
            if isinstance(bound, torch.Tensor):
                kept = bound.expand(len(x), -1)
            else:
                kept = self._scores(way.kind, x, (g, u)) >= bound
            self.kept.append(kept.numpy())
            return self._out(g * u * kept)

        return run

    def account(self, way: Way) -> None:
        """Add what the layer kept since the call before to the way, as one sequence of tokens behind one cache."""
        if not self.kept:
            return  # dense
        kept = np.concatenate(self.kept)
        self.kept.clear()
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
    count = sum(part.rows for part in (ffn.parts if isinstance(ffn, RecordFfn) else ffn.up.parts))
    gate, up, down = (torch.empty(count, d) for _ in range(3))
    if isinstance(ffn, RecordFfn):
        width = format_bytes(ffn.format, d)
        for part in ffn.parts:
            with feed.use(part.slice) as data:
                records = data.view(part.rows, -1)
                for i, whole in enumerate((gate, up, down)):
                    rows = records[:, i * width : (i + 1) * width].contiguous()
                    whole[part.start : part.start + part.rows] = kernels.dequantize(rows, ffn.format, d)
        return gate, up, down, 3 * width
    stored = 0
    assert ffn.gate is not None
    for linear, whole in ((ffn.gate, gate), (ffn.up, up), (ffn.down, down.T)):
        for part in linear.parts:
            with feed.use(part.slice) as data:
                stored += data.numel()
                rows = kernels.dequantize(data.view(part.rows, -1), linear.format, linear.cols)
                whole[part.start : part.start + part.rows] = rows
    return gate, up, down, stored // count
