"""Which experts a token goes to, and with what weights: as the model was trained, or with an eye on the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..config import MoeConfig


def route(logits: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (weights [T, k], experts [T, k]): softmax over all, then the k largest, of the best
    groups where experts stand in groups."""
    probs = logits.softmax(-1)
    if moe.num_groups > 1:
        probs = probs.masked_fill(other_groups(logits, moe), 0.0)
    weights, experts = probs.topk(moe.num_experts_per_tok, dim=-1)
    return _scaled(weights, moe), experts


def other_groups(logits: torch.Tensor, moe: MoeConfig) -> torch.Tensor:
    """Of logits [T, E], which are not of the groups_per_tok groups with the largest (2405.04434)."""
    best = logits.unflatten(-1, (moe.num_groups, -1)).amax(-1)
    others = torch.ones_like(best, dtype=torch.bool).scatter_(-1, best.topk(moe.groups_per_tok, dim=-1).indices, False)
    return others.repeat_interleave(moe.num_experts // moe.num_groups, -1)


def _scaled(weights: torch.Tensor, moe: MoeConfig) -> torch.Tensor:
    weights = weights / weights.sum(-1, keepdim=True) if moe.norm_topk_prob else weights
    return weights if moe.routed_scaling == 1.0 else weights * moe.routed_scaling


def route_groups(primary: torch.Tensor, logits: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Two levels (1701.06538, appendix B): the best groups by `primary` [T, G], the best of each by `logits` [T, E].

    Both softmaxes are over what is kept, and a weight is the product of the two. Experts of -inf have no weight.
    """
    tokens, few = len(primary), moe.gate_groups_per_tok
    top, groups = primary.topk(few, dim=-1)
    inside = logits.view(tokens, moe.gate_groups, -1)
    kept, numbers = inside.gather(1, groups[..., None].expand(-1, -1, inside.shape[-1])).topk(
        moe.num_experts_per_tok // few, dim=-1
    )
    weights = (top.softmax(-1)[..., None] * kept.softmax(-1)).nan_to_num(0.0)
    return weights.flatten(1), (numbers + groups[..., None] * inside.shape[-1]).flatten(1)


@dataclass
class CacheBias:
    """Cache-aware routing (2412.00099): experts that are here are preferred. Lossy.

    `strength` times the router's usual range of logits is added to those of resident experts, for the choice alone:
    the weights come from the true logits, and the `keep_top` best by them are chosen whatever is here.
    """

    strength: float
    keep_top: int
    spans: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum and number of ranges seen

    def route(self, logits: torch.Tensor, held: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """As `route`; held bool [E]: what costs no read."""
        spans = logits.amax(-1) - logits.amin(-1)
        self.spans[0] += float(spans.sum())
        self.spans[1] += len(spans)
        probs = logits.softmax(-1)
        raised = logits + self.strength * (self.spans[0] / self.spans[1]) * held
        if moe.num_groups > 1:
            others = other_groups(logits, moe)
            probs, raised = probs.masked_fill(others, 0.0), raised.masked_fill(others, float("-inf"))
        if self.keep_top:
            best = probs.topk(min(self.keep_top, moe.num_experts_per_tok), dim=-1).indices
            raised = raised.scatter(-1, best, float("inf"))
        chosen = raised.topk(moe.num_experts_per_tok, dim=-1).indices
        weights, order = probs.gather(-1, chosen).sort(stable=True, dim=-1, descending=True)
        return _scaled(weights, moe), chosen.gather(-1, order)


@dataclass(frozen=True)
class CacheGap:
    """Cache-aware routing by what it takes from a token: an expert that is away gives its place to the best one that is
    here. A swap takes what its share of the token's weights is above the share that one then has, and all of a token's
    swaps together may take `gap`, however many experts it has. Lossy.

    The worst chosen goes first, the `keep_top` best stay whatever is here. 2412.00099 prefers what is here among the M
    best, or the best up to a sum of probabilities; that a sum is nearly reached says little of what a swap costs.
    """

    gap: float
    keep_top: int

    def route(self, logits: torch.Tensor, held: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """As `route`; held bool [E]: what costs no read."""
        probs = logits.softmax(-1)
        if moe.num_groups > 1:
            probs = probs.masked_fill(other_groups(logits, moe), 0.0)
        chosen = torch.tensor(self.choose(probs, held.tolist(), moe), device=logits.device)
        return _scaled(probs.gather(-1, chosen), moe), chosen

    def choose(self, probs: torch.Tensor, here: list[bool], moe: MoeConfig) -> list[list[int]]:
        """The experts of tokens with these probabilities [T, E], each token's by descending probability."""
        best = probs.topk(moe.num_experts_per_tok, dim=-1).indices.tolist()
        return [
            chosen if all(here[expert] for expert in chosen[self.keep_top :]) else self._swap(row, chosen, here)
            for row, chosen in zip(probs.tolist(), best, strict=True)
        ]

    def _swap(self, probs: list[float], chosen: list[int], here: list[bool]) -> list[int]:
        """The experts of one token: probabilities of all, and those chosen, best first, of which some are away."""
        best, chosen = {*chosen}, [*chosen]
        order = sorted(range(len(probs)), key=probs.__getitem__, reverse=True)
        others = (e for e in order if here[e] and e not in best and probs[e] > 0)
        total, left, other = sum(probs[e] for e in chosen), self.gap, next(others, None)
        for rank in reversed(range(self.keep_top, len(chosen))):
            if here[chosen[rank]]:
                continue
            if other is None:
                break
            old, new = probs[chosen[rank]], probs[other]
            cost = old / total - new / (total - old + new)
            if cost <= left:
                left -= cost
                total += new - old
                chosen[rank], other = other, next(others, None)
        return sorted(chosen, key=probs.__getitem__, reverse=True)
