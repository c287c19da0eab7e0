"""Neurons that fire together, side by side: an order for each layer (Ripple, 2410.19274), exact and without training.

The chain starts at the neuron demanded most; each time the neuron follows that was demanded most often together with
the last one and has no place yet. So a token's neurons stand in runs, and a run is one read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def chain(tokens: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Ids that tokens demanded together -> int32 [count], the neurons in their new order. Those never demanded come
    last, as they stood."""
    demanded = np.zeros((len(tokens), count), bool)
    for row, ids in zip(demanded, tokens, strict=True):
        row[ids] = True
    often = demanded.sum(0)
    by_neuron = [np.flatnonzero(column) for column in demanded.T]
    left = often > 0
    order = np.empty(count, np.int32)
    place, current = 0, int(often.argmax())
    seen = demanded.view(np.uint8)
    for place in range(int(left.sum())):
        if place:
            together = seen[by_neuron[current]].sum(0, dtype=np.int32)
            together = np.where(left, together, -1)
            best = int(together.argmax())
            if not together[best]:  # nobody is left that ever fired with it: begin anew
                best = int(np.where(left, often, -1).argmax())
            current = best
        order[place] = current
        left[current] = False
    silent = np.flatnonzero(often == 0)
    order[count - len(silent) :] = silent
    return order


def runs(ids: np.ndarray, gap: int) -> int:
    """Reads that ids (ascending) take when gaps of up to `gap` records are read through."""
    return 0 if not len(ids) else 1 + int((np.diff(ids) > gap + 1).sum())
