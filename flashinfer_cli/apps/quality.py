"""What running sparse costs: perplexity of held-out tokens as at decoding and densely; and what those tokens demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from .. import device
from ..bundles.order import chain
from ..bundles.sparsity import ORDER_FILE, Sparsity
from ..config import RunConfig
from ..engine import Engine
from ..models.layout import lay_out
from ..models.open import OpenModel, open_model
from ..models.sizes import sizes_of
from ..plan import make_plan
from .evaluate import log_probs, windows

SEQUENCE = 512  # tokens of a window

Progress = Callable[[int, int, str], None]


class Demands:
    """What each token of a text of `tokens` demanded of each layer, a bit a neuron; those where windows meet, twice.

    All of its memory is taken at once, so that it belongs to the process when the run that it watches is planned: a run
    takes its whole budget.
    """

    def __init__(self, counts: dict[int, int], tokens: int) -> None:
        self.counts = counts
        rows = self._rows(tokens)
        self._bits = {layer: np.empty((rows, -(-count // 8)), np.uint8) for layer, count in counts.items()}
        for bits in self._bits.values():
            bits.fill(0)  # which is what takes it
        self._tokens = dict.fromkeys(counts, 0)

    @staticmethod
    def _rows(tokens: int) -> int:
        return sum(map(len, windows(range(tokens), SEQUENCE)))

    @classmethod
    def nbytes(cls, layers: int, count: int, tokens: int) -> int:
        """Of so many layers of `count` neurons."""
        return layers * cls._rows(tokens) * -(-count // 8)

    def expect(self, layer: int, worth: np.ndarray) -> None:
        """What policies go by is not kept."""

    def demand(self, phase: str, layer: int, chosen: np.ndarray) -> None:
        if phase == "decode":
            demanded = np.zeros(self.counts[layer], bool)
            demanded[chosen[0]] = True
            self._bits[layer][self._tokens[layer]] = np.packbits(demanded)
            self._tokens[layer] += 1

    def of(self, layer: int) -> list[np.ndarray]:
        """The ids, ascending, that each token demanded."""
        asked = self._bits[layer][: self._tokens[layer]]
        return [np.flatnonzero(np.unpackbits(bits, count=self.counts[layer])) for bits in asked]

    def write_order(self, folder: Path, progress: Progress | None) -> None:
        """Which neurons belong side by side, for `reorder`."""
        orders: dict[str, torch.Tensor] = {}
        for layer, count in self.counts.items():
            if progress is not None:
                progress(len(orders), len(self.counts), "finding which neurons fire together")
            orders[str(layer)] = torch.from_numpy(chain(self.of(layer), count))
        save_file(orders, folder / ORDER_FILE)


def quality(
    path: Path,
    ids: list[int],
    run: RunConfig,
    progress: Progress | None,
    demands: Demands,
    found: Sparsity,
    predictors: Path,
) -> dict[str, float]:
    """Perplexity of held-out tokens, computed as at decoding and densely, and how often both have the same choice.

    `found` and its `predictors` need not be the bundle's yet; `demands` takes down what they ask for.
    """
    sparse, chosen = _score(path, ids, replace(run, exact=False), progress, demands, found, predictors)
    dense, wanted = _score(path, ids, replace(run, exact=True), progress)
    return {
        "perplexity": sparse,
        "dense_perplexity": dense,
        "top1_agreement": float((chosen == wanted).float().mean()),
    }


def least_to_measure(opened: OpenModel, layers: Collection[int], run: RunConfig) -> int:
    """Bytes that `quality` takes at least, beside predictors of these layers, in this process as it stands now."""
    run = replace(_settled(run), kv_cache_type=opened.kv_cache_type(run.kv_cache_type))
    layout = lay_out(opened.checkpoint, opened.config, opened.weights, layers)
    sizes, process = sizes_of(layout, opened.config, run), device.resident_bytes()
    return make_plan(
        sizes, budget=1 << 60, process=process, peak_so_far=0, context=SEQUENCE, chunk=run.prefill_chunk, stream="auto"
    ).least  # fmt: skip


def _settled(run: RunConfig) -> RunConfig:
    return replace(run, context=SEQUENCE, logit_rows=64, prefill_chunk=64)


def _score(
    path: Path,
    ids: list[int],
    run: RunConfig,
    progress: Progress | None,
    demands: Demands | None = None,
    found: Sparsity | None = None,
    predictors: Path | None = None,
) -> tuple[float, torch.Tensor]:
    """(perplexity, the first choice at every position) of one run."""
    nats, count, chosen = 0.0, 0, []
    what = "measuring it dense" if run.exact else "measuring it sparse"
    opened = open_model(path)
    if found is not None:
        vars(opened).update(sparsity=found, predictors_file=predictors)  # as if the bundle had them
    with Engine(opened, _settled(run)) as engine:
        if demands is not None and engine.neurons is not None:
            engine.neurons.trace = demands
        for window in windows(ids, SEQUENCE):
            place = 0
            for lp in log_probs(engine, window):
                targets = torch.tensor(window[place + 1 : place + 1 + len(lp)])
                nats -= float(lp[: len(targets)].gather(1, targets[:, None]).sum())
                count += len(targets)
                place += len(lp)
                chosen.append(lp.argmax(-1))
                if progress is not None:
                    progress(count, len(ids), what)
    return math.exp(nats / count), torch.cat(chosen)
