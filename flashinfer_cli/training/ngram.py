"""What a model must beat: n-grams of tokens with interpolated Kneser-Ney back-off, the strong one of its kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ORDER = 4


@dataclass(frozen=True)
class _Order:
    """Counts of one length: keys are sequences in base V, sorted; contexts are the same without their last token."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray  # by context: sum of counts
    kinds: np.ndarray  # by context: different tokens that follow
    discount: float


def _find(sorted_keys: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` at the places of `wanted`, zero where they are absent."""
    if not len(sorted_keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == wanted, values[place], 0).astype(np.float64)


class NGram:
    """Trained on a stream of token ids; `log_prob` gives nats. The vocabulary must stay below 2^15 for order 4."""

    def __init__(self, stream: np.ndarray, vocab_size: int, order: int = ORDER) -> None:
        assert vocab_size**order < 2**63
        self.vocab_size, self.order = vocab_size, order
        self._orders: list[_Order] = []
        ids = stream.astype(np.int64)
        keys, counts = np.unique(self._windows(ids, order), return_counts=True)
        for n in range(order, 0, -1):
            self._orders.append(self._count(keys, counts))
            # below the highest order a sequence counts once for every different token that it was seen behind
            keys, counts = np.unique(keys % vocab_size ** (n - 1), return_counts=True) if n > 1 else (keys, counts)
        self._orders.reverse()

    def _windows(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Every sequence of n tokens as one number, the oldest token leading."""
        key = np.zeros(max(len(ids) - n + 1, 0), np.int64)
        for i in range(n):
            key = key * self.vocab_size + ids[i : len(ids) - n + 1 + i]
        return key

    def _count(self, keys: np.ndarray, counts: np.ndarray) -> _Order:
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = float(once / (once + 2 * twice)) if once and twice else 0.5
        contexts, first = np.unique(keys // self.vocab_size, return_index=True)
        edges = np.append(first, len(keys))
        return _Order(keys, counts, contexts, np.add.reduceat(counts, first), np.diff(edges), discount)

    def probability(self, context: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """P(token | its context): context int [N, order - 1], oldest first; tokens int [N] -> float64 [N]."""
        probability = np.full(len(tokens), 1 / self.vocab_size)
        for n, counts in enumerate(self._orders, start=1):
            key = np.zeros(len(tokens), np.int64)
            for i in range(self.order - n, self.order - 1):
                key = key * self.vocab_size + context[:, i]
            total = _find(counts.contexts, key, counts.totals)
            kinds = _find(counts.contexts, key, counts.kinds)
            seen = _find(counts.keys, key * self.vocab_size + tokens, counts.counts)
            known = np.maximum(total, 1)
            mixed = np.maximum(seen - counts.discount, 0) / known + counts.discount * kinds / known * probability
            probability = np.where(total > 0, mixed, probability)
        return probability

    def nats(self, stream: np.ndarray) -> float:
        """Of all tokens of a stream but the first `order` - 1."""
        ids, past = stream.astype(np.int64), self.order - 1
        context = np.stack([ids[i : len(ids) - past + i] for i in range(past)], axis=1)
        return float(-np.log(self.probability(context, ids[past:])).sum())
