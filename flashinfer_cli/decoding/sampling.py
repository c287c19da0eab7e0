"""From logits to a token: pure functions on float32 tensors, composed once into a Sampler.

Order and meaning are those of transformers' logits processors: repetition penalty (1909.05858), temperature, top-k,
top-p (1904.09751), min-p (2407.01082). Every function takes [V] or [T, V], a row a position, and leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..config import SamplingParams
from ..errors import GenaiRunError

RecentIds = Sequence[int] | Sequence[Sequence[int]]
Filter = Callable[[Tensor], Tensor]

LEAST_TEMPERATURE = 1e-20  # below, logits divided by it overflow float32; the distribution is greedy long before


def apply_repeat_penalty(logits: Tensor, recent_ids: RecentIds, penalty: float) -> Tensor:
    """Divide positive logits of `recent_ids` by `penalty` and multiply negative ones, once an id.

    `recent_ids` is a list of ids for all rows, or for [T, V] one list a row.
    """
    if penalty == 1.0 or not len(recent_ids):
        return logits
    if not isinstance(recent_ids[0], int):
        rows = cast("Sequence[Sequence[int]]", recent_ids)
        return torch.stack([apply_repeat_penalty(row, ids, penalty) for row, ids in zip(logits, rows, strict=True)])
    ids = torch.tensor(sorted(set(cast("Sequence[int]", recent_ids))), device=logits.device)
    chosen = logits[..., ids]
    penalised = logits.clone()
    penalised[..., ids] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    return penalised


def temperature(logits: Tensor, value: float) -> Tensor:
    """Logits divided by `value`, which is above 0."""
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits and all that equal the k-th; the rest become -inf. A k of 0, V or more keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens whose probabilities reach `p` together, at least one; the rest become -inf."""
    if p >= 1.0:
        return logits
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - p
    drop[..., -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least `p` times as likely as the likeliest; the rest become -inf."""
    if p <= 0.0:
        return logits
    probs = logits.softmax(dim=-1)
    best, place = probs.max(dim=-1, keepdim=True)
    return logits.masked_fill((probs < p * best).scatter(-1, place, False), -torch.inf)


@dataclass(frozen=True)
class Sampler:
    """The distribution a token is drawn from, and the draw. In speculative decoding draft and target share one."""

    filters: tuple[Filter, ...]
    greedy: bool
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64

    def probs(self, logits: Tensor, recent_ids: RecentIds = ()) -> Tensor:
        """The float32 probabilities, [V] or [T, V], really sampled from; greedy is one-hot at the first maximum.

        `recent_ids` is what came before (for [T, V] maybe one list a row); the last `repeat_last_n` of it count, all
        for -1. GenaiRunError where the logits hold NaN or nothing that is finite.
        """
        logits = apply_repeat_penalty(logits.float(), self._last(recent_ids), self.repeat_penalty)
        if not bool(logits.amax(dim=-1).isfinite().all()):  # amax gives NaN on for NaN
            raise GenaiRunError(
                "The model gave logits that are no finite numbers.",
                "Its weights may be damaged, or overflow in this dtype.",
            )
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        for step in self.filters:
            logits = step(logits)
        return logits.softmax(dim=-1)

    def sample(self, probs: Tensor, generator: torch.Generator | None = None) -> int:
        """An id drawn from `probs` [V]; greedy draws nothing from the generator."""
        if self.greedy:
            return int(probs.argmax())
        return int(torch.multinomial(probs, 1, generator=generator))

    def _last(self, recent_ids: RecentIds) -> RecentIds:
        if self.repeat_penalty == 1.0 or self.repeat_last_n == 0:
            return ()
        if self.repeat_last_n < 0 or not len(recent_ids):
            return recent_ids
        if isinstance(recent_ids[0], int):
            return recent_ids[-self.repeat_last_n :]
        return [row[-self.repeat_last_n :] for row in cast("Sequence[Sequence[int]]", recent_ids)]


def make_sampler(params: SamplingParams) -> Sampler:
    """Compose the filters that `params` asks for. It is resolved (`SamplingParams.resolved`): nothing is None."""
    heat, penalty = params.temperature, params.repeat_penalty
    k, p, least = params.top_k, params.top_p, params.min_p
    assert heat is not None and penalty is not None, params
    assert k is not None and p is not None and least is not None, params
    filters: list[Filter] = []
    if heat != 1.0:
        filters.append(lambda logits: temperature(logits, heat))
    if k > 0:
        filters.append(lambda logits: top_k(logits, k))
    if p < 1.0:
        filters.append(lambda logits: top_p(logits, p))
    if least > 0.0:
        filters.append(lambda logits: min_p(logits, least))
    return Sampler(tuple(filters), heat < LEAST_TEMPERATURE, penalty, params.repeat_last_n)
