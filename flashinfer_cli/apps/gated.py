"""What skipping neurons would bring a model whose activation leaves none at zero (SiLU, GELU): measured, not assumed.

Several ways to say which neurons matter for a token (`ways`) run through the model side by side, each at several
densities; the model passes once, a layer at a time. Thresholds are set on calibration tokens, perplexity is of held-out
ones.

What a way reads a token comes from running its demands through a neuron cache of what memory is left beside its copies;
how long that takes from reading what some of these tokens missed, neighbours together, as runs read neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import device
from ..config import RunConfig
from ..engine import Engine
from ..errors import UnsupportedModelError
from ..layers.ffn import DenseFfn, RecordFfn
from ..models.open import OpenModel, open_model
from ..store.drive import MEASURED, measure, measure_records
from .calibrate import LEAST_TOKENS
from .layerwise import one_layers_cache
from .room import Passing, refuse_below
from .text import ids_of
from .ways import KINDS, MEMORY, Asked, StudiedLayer, Way

DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
WINDOW = 512
ROWS = 64  # of logits at once
SAMPLES = 8  # layers whose misses are read, to time it
SECTOR = 512  # records are padded to it
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Study:
    """What was found. `best` names a way by (kind, density) for each share of memory; none pays where it is missing."""

    model: str
    tokens: int  # that thresholds are set on
    test_tokens: int
    perplexity: float
    error: float  # of that perplexity, as a share: one standard error of the mean loss
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
    """Measure every way on a model with a gated FFN. Raises UnsupportedModelError, UsageError for too little text,
    BudgetError."""
    opened = open_model(model)
    config = opened.config
    if not config.gated or config.moe is not None or config.mod is not None:
        raise UnsupportedModelError("Only dense layers with a gate can be studied so.")
    ids = ids_of(opened, text, min(tokens, LEAST_TOKENS) + test_tokens)
    tokens = min(tokens, len(ids) - test_tokens)
    learn, test = _windows(ids[:tokens]), _windows(ids[tokens : tokens + test_tokens])
    ways = [Way("dense", 1.0)] + [Way(kind, density) for kind in KINDS for density in DENSITIES]
    settled = replace(run, exact=True, context=WINDOW, prefill_chunk=WINDOW, logit_rows=ROWS, stream="always")
    refuse_below(_least(opened, settled, tokens, test_tokens, len(ways)), tokens, run, fewer=tokens > LEAST_TOKENS)
    losses, asked, width = _run(opened, settled, learn, test, ways, progress)
    count, files = config.num_hidden_layers, opened.checkpoint.files
    for way, loss in zip(ways, losses, strict=True):
        way.perplexity, way.error = math.exp(float(loss.mean())), _error(loss - losses[0])
        way.kept /= count
        way.misses = {share: missed / count for share, missed in way.misses.items()}
    file = max(files, key=lambda path: path.stat().st_size)
    rates = [measure(file).bytes_per_second]
    for way in ways[1:]:
        record = _padded(int(way.fetched * width))
        for share in MEMORY if way.kind != "product" else ():
            way.seconds[share] = count * min(
                measure_records(file, record, asked[way.kind, way.density, share]) for _ in range(2)
            )  # the better one, as of plain streaming: what else the machine does only slows
    rates.append(measure(file).bytes_per_second)
    found = Study(
        opened.name, tokens, test_tokens, ways[0].perplexity, _error(losses[0]), tuple(ways[1:]), max_increase,
        width * config.intermediate_size * count, max(rates), {},
    )  # fmt: skip
    return replace(found, best=_best(found))


def _least(opened: OpenModel, run: RunConfig, tokens: int, test_tokens: int, ways: int) -> int:
    """Bytes that a study takes, the process included: of one layer, of the head, or of what times the drive."""
    passing, config = Passing.through(opened, run), opened.config
    states = 4 * config.hidden_size * (tokens + ways * test_tokens)
    asked = len(_samples(config.num_hidden_layers)) * ways * len(MEMORY) * 8 * config.intermediate_size
    layer = StudiedLayer.nbytes(config.hidden_size, config.intermediate_size, tokens, WINDOW, test_tokens)
    records = _padded(12 * config.hidden_size) * config.intermediate_size  # of float32, at most
    after = max(passing.head, records, MEASURED)
    learning = device.resident_bytes() + passing.engine + asked + states + max(passing.beside + layer, after)
    return max(learning, device.peak_bytes())


def _samples(layers: int) -> range:
    """Those that have their misses read."""
    return range(0, layers, max(1, layers // SAMPLES))


def _padded(nbytes: int) -> int:
    return -(-nbytes // SECTOR) * SECTOR


def _run(
    opened: OpenModel,
    run: RunConfig,
    learn: list[list[int]],
    test: list[list[int]],
    ways: list[Way],
    progress: Progress | None,
) -> tuple[list[torch.Tensor], Asked, int]:
    """The losses of every way's tokens, the ids that it missed, the bytes of a neuron; sums over layers go into the
    ways."""
    asked: Asked = {}
    with Engine(opened, run) as engine, torch.inference_mode():
        decoder, rt, scale = engine.decoder, engine.decoder.rt, engine.config.embedding_scale
        kv = one_layers_cache(engine, WINDOW)
        states = [decoder.embedding(torch.tensor(w), rt) * scale for w in learn]
        tested = [[decoder.embedding(torch.tensor(w), rt) * scale for w in test] for _ in ways]
        samples = _samples(len(decoder.blocks))
        for index, block in enumerate(decoder.blocks):
            if progress is not None:
                progress(index, len(decoder.blocks), "measuring what neurons matter")
            assert isinstance(block.ffn, DenseFfn | RecordFfn)
            with rt.feed.hold(decoder.slices_of(index)):
                layer = StudiedLayer(block.ffn, engine, sampled=index in samples)
                for number, x in enumerate(states):
                    kv.trim(0)
                    states[number] = replace(block, ffn=layer.watching)(x, kv, len(x), rt)  # type: ignore[arg-type]
                layer.settle(ways)
                layer.asked = asked
                for number, way in enumerate(ways):
                    ffn = layer.skipping(way)
                    for part, x in enumerate(tested[number]):
                        kv.trim(0)
                        tested[number][part] = replace(block, ffn=ffn)(x, kv, len(x), rt)  # type: ignore[arg-type]
                    layer.account(way)
                width = layer.neuron_bytes
                del layer, ffn  # before the next one comes
        with rt.feed.hold(decoder.head.slices):
            losses = [torch.cat([_losses(engine, x, w) for x, w in zip(parts, test, strict=True)]) for parts in tested]
    return losses, asked, width


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


def _windows(ids: list[int]) -> list[list[int]]:
    return [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]


def _losses(engine: Engine, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Nats of every token of `ids` but the first; x [N, d] is what comes out of the last layer."""
    decoder, config, found = engine.decoder, engine.config, []
    if decoder.final_norm is not None:
        x = decoder.final_norm(x)
    for first in range(0, len(ids) - 1, ROWS):
        logits = decoder.head(x[first : first + ROWS].contiguous(), decoder.rt) * config.logit_scale
        if config.final_logit_softcap:
            logits = (logits / config.final_logit_softcap).tanh() * config.final_logit_softcap
        targets = torch.tensor(ids[first + 1 : first + ROWS + 1])
        found.append(-logits.log_softmax(-1)[: len(targets)].gather(1, targets[:, None])[:, 0].double())
    return torch.cat(found)


def _error(losses: torch.Tensor) -> float:
    """One standard error of their mean: of a perplexity, or of a ratio of two, a share."""
    return float(losses.std() / len(losses) ** 0.5)
