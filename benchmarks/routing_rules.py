"""Rules of cache-aware routing over many streams at once: router logits and what is here -> weights and choice.

`cache_routing` says what each is and compares them. All take logits [B, E], held bool [B, E], the number k of experts,
and a layer's share of what the rule may lose, and give weights [B, k] and experts [B, k].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Rule = Callable[[torch.Tensor, torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]


def _by_logits(logits: torch.Tensor, raised: torch.Tensor, k: int, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of `raised` [B, E], the `keep` best by `logits` among them; weights over what is chosen."""
    if keep:
        raised = raised.scatter(-1, logits.topk(keep, dim=-1).indices, float("inf"))
    chosen = raised.topk(k, dim=-1).indices
    return logits.gather(-1, chosen).softmax(-1), chosen


@dataclass
class Bias:
    strength: float
    keep: int
    spans: dict[int, list[float]] = field(default_factory=dict)

    def __call__(
        self, logits: torch.Tensor, held: torch.Tensor, k: int, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        span = self.spans.setdefault(0, [0.0, 0.0])
        ranges = logits.amax(-1) - logits.amin(-1)
        span[0] += float(ranges.sum())
        span[1] += len(ranges)
        return _by_logits(logits, logits + self.strength * span[0] / span[1] * held, k, self.keep)


class _NearFirst:
    """What is here first, among experts that are near enough to the best."""

    keep: int

    def near(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, E] -> bool [B, E]."""
        raise NotImplementedError

    def __call__(
        self, logits: torch.Tensor, held: torch.Tensor, k: int, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _by_logits(logits, logits + 1e4 * (held & self.near(logits)), k, self.keep)


@dataclass
class Rank(_NearFirst):
    most: int
    keep: int

    def near(self, logits: torch.Tensor) -> torch.Tensor:
        best = logits.topk(self.most, dim=-1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)


@dataclass
class Mass(_NearFirst):
    share: float
    keep: int

    def near(self, logits: torch.Tensor) -> torch.Tensor:
        probs, order = logits.softmax(-1).sort(descending=True, dim=-1)
        before = probs.cumsum(-1) - probs  # what the better ones have together
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before < self.share)


@dataclass
class Swap:
    """`ratio`, `gap`, `layers` and `squares`: the worst chosen first, each by the best one here that was not chosen."""

    ratio: float = 0.0
    gap: float = 9.0
    keep: int = 0
    by_layer: bool = False
    squares: bool = False

    def __call__(
        self, logits: torch.Tensor, held: torch.Tensor, k: int, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = logits.topk(k, dim=-1).indices
        left = torch.full((len(logits), 1), self.gap * (share if self.by_layer else 1))
        all_squares = logits.gather(-1, chosen).softmax(-1).square().sum(-1, keepdim=True)
        for place in range(k - 1, self.keep - 1, -1):
            expert = chosen[:, place : place + 1]
            others = logits.masked_fill(~held, float("-inf")).scatter(-1, chosen, float("-inf"))
            value, other = others.max(-1, keepdim=True)
            old = logits.gather(-1, chosen).softmax(-1)[:, place : place + 1]
            new = logits.gather(-1, chosen.scatter(1, expert.new_full(expert.shape, place), other)).softmax(-1)
            fine = (value - logits.gather(-1, expert)).exp() >= self.ratio
            cost = old - new[:, place : place + 1]
            if self.squares:
                cost = cost * old / all_squares
            fine &= cost <= left
            fine &= ~held.gather(-1, expert) & value.isfinite()
            left = left - cost.where(fine, 0.0)
            chosen = chosen.scatter(1, expert.new_full(expert.shape, place), torch.where(fine, other, expert))
        return logits.gather(-1, chosen).softmax(-1), chosen


@dataclass
class Drop:
    share: float
    keep: int

    def __call__(
        self, logits: torch.Tensor, held: torch.Tensor, k: int, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = logits.topk(k, dim=-1)
        weights = values.softmax(-1)
        out = ~held.gather(-1, chosen) & (weights < self.share)
        out[:, : max(self.keep, 1)] = False
        return values.masked_fill(out, float("-inf")).softmax(-1), chosen.masked_fill(out, -1)
