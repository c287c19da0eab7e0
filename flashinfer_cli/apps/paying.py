"""Does reading neurons on demand pay: beside streaming an FFN plainly, on the drive that the bundle is on.

What a calibration's held-out tokens demanded goes through slots of a share of the FFN's bytes, less what predictors
take: that says how many neurons a token reads, wherever the bundle goes. How long reading so many takes is measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundles.format import RecordLayout
from ..bundles.sparsity import Sparsity
from ..cache.window import Recent
from ..models.open import open_model
from ..store.drive import measure, measure_records
from .quality import Demands
from .ways import MEMORY, WARM

SAMPLES = 8  # layers whose reads are measured


@dataclass(frozen=True)
class Reading:
    """With `memory` of the FFN's bytes in memory: what a token reads, as a share of them, and what reading it takes."""

    memory: float
    plain: float
    plain_seconds: float
    neurons: float
    neurons_seconds: float

    @property
    def pays(self) -> bool:
        return self.neurons_seconds < self.plain_seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"pays": self.pays}


def missed(demands: Demands, records: Mapping[int, RecordLayout], found: Sparsity) -> dict[str, float]:
    """Neurons that a token reads, as a share of all, with each share of MEMORY for slots and predictors."""
    misses = dict.fromkeys(map(str, MEMORY), 0.0)
    for layer in found.layers:
        count, width = records[layer.layer].count, records[layer.layer].width_bytes
        tokens = demands.of(layer.layer)
        warm = WARM if len(tokens) >= 2 * WARM else 0  # a short text has no others
        for memory in MEMORY:
            policy = Recent(count, max(0, int(memory * count) - layer.bytes // width))
            for number, ids in enumerate(tokens):
                policy.demand(ids, counted=number >= warm)
            misses[str(memory)] += policy.misses / max(1, len(tokens) - warm) / count / len(found.layers)
    return misses


def readings(bundle: str | Path, found: Sparsity) -> list[Reading]:
    """What `missed` comes to on this drive: neurons drawn at random, each layer's when the one before has come, beside
    plain streaming, before and after."""
    opened = open_model(bundle)
    records: Mapping[int, RecordLayout] = getattr(opened.checkpoint, "records", {})
    layouts = [records[layer.layer] for layer in found.layers]
    sampled = layouts[:: max(1, len(layouts) // SAMPLES)][:SAMPLES]
    total = sum(layout.count * layout.width_bytes for layout in layouts)
    largest = max(opened.checkpoint.files, key=lambda path: path.stat().st_size)
    rates, draw, seconds = [measure(largest, seconds=0.5).bytes_per_second], random.Random(0), {}
    for memory in MEMORY:
        seconds[memory] = 0.0
        for layout in sampled:
            asked = round(found.missed[str(memory)] * layout.count)
            ids = [np.array(sorted(draw.sample(range(layout.count), asked)), np.int64) for _ in range(2)]
            place = opened.checkpoint.path / layout.file
            best = min(measure_records(place, layout.width_bytes, ids) for _ in range(2))  # others' work only slows it
            seconds[memory] += best * len(layouts) / len(sampled)
    rates.append(measure(largest, seconds=0.5).bytes_per_second)
    return [
        Reading(m, 1 - m, (1 - m) * total / max(rates), found.missed[str(m)], seconds[m]) for m in MEMORY
    ]  # fmt: skip
