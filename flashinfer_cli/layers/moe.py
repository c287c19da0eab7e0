"""The sparsely-gated mixture of experts (1701.06538), its experts in the expert cache (2312.17238)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from ..cache.experts import Arrivals, ExpertCache, Pieces
from ..config import MoeConfig
from .expert import ExpertLayout, apply_expert, apply_experts, together
from .ffn import DenseFfn
from .linear import Runtime
from .norm import Norm


def route(logits: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (weights [T, k], experts [T, k]): softmax over all, then the k largest, of the best
    groups where experts stand in groups."""
    probs = logits.softmax(-1)
    if moe.num_groups > 1:
        probs = probs.masked_fill(_other_groups(logits, moe), 0.0)
    weights, experts = probs.topk(moe.num_experts_per_tok, dim=-1)
    return _scaled(weights, moe), experts


def _other_groups(logits: torch.Tensor, moe: MoeConfig) -> torch.Tensor:
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
            others = _other_groups(logits, moe)
            probs, raised = probs.masked_fill(others, 0.0), raised.masked_fill(others, float("-inf"))
        if self.keep_top:
            best = probs.topk(min(self.keep_top, moe.num_experts_per_tok), dim=-1).indices
            raised = raised.scatter(-1, best, float("inf"))
        chosen = raised.topk(moe.num_experts_per_tok, dim=-1).indices
        weights, order = probs.gather(-1, chosen).sort(stable=True, dim=-1, descending=True)
        return _scaled(weights, moe), chosen.gather(-1, order)


@dataclass(frozen=True)
class Ahead:
    """The router of a layer still to come, applied to the hidden state of now (2312.17238, speculative loading).

    `scale` [d] undoes the norm of this layer's FFN and applies the other's: RMS norms differ by their weights alone.
    """

    distance: int  # layers
    layer: int
    router: torch.Tensor  # float32 [E, d]
    router_bias: torch.Tensor | None
    scale: torch.Tensor | None

    def guess(self, x: torch.Tensor, moe: MoeConfig, most: int) -> list[int]:
        """x [T, d] -> the experts that the tokens will want, at most `most`, best first."""
        logits = F.linear(x if self.scale is None else x * self.scale, self.router, self.router_bias)
        if moe.num_groups > 1:
            logits = logits.masked_fill(_other_groups(logits, moe), float("-inf"))
        if len(x) == 1:
            best = logits[0].topk(min(most, logits.shape[-1])).indices.tolist()
        else:
            picked = logits.topk(moe.num_experts_per_tok, dim=-1).indices.flatten()
            wanted = torch.bincount(picked, minlength=moe.num_experts)
            order = wanted.argsort(descending=True, stable=True)[:most]
            best = order[wanted[order] > 0].tolist()
        return [e for e in best if e < moe.num_experts]


def rescale(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """Weights [d] of two RMS norms -> what turns the output of the first into that of the second."""
    return then / torch.where(now.abs() < 1e-3, torch.ones_like(now), now)


@dataclass(frozen=True)
class FirstGuess:
    """Guesses the first layers' experts from a token's embedding, while the first attention is still to run."""

    norm: Norm
    ahead: tuple[Ahead, ...]
    moe: MoeConfig
    cache: ExpertCache

    def __call__(self, x: torch.Tensor, rt: Runtime) -> None:
        """x [T, d], the embedding as the first block sees it."""
        if self.cache.distances:
            with rt.recorder.computing():
                guess_ahead(self.ahead, self.norm(x), self.moe, self.cache)


def guess_ahead(ahead: tuple[Ahead, ...], x: torch.Tensor, moe: MoeConfig, cache: ExpertCache) -> None:
    """Tell the cache what layers ahead are thought to need; x [T, d] is an FFN's input."""
    most = max(cache.guessing.most, moe.num_experts_per_tok)
    if cache.trace is not None:
        most = max(most, min(moe.num_experts, 4 * moe.num_experts_per_tok))
    for other in ahead:
        if other.distance in cache.distances:
            cache.guess(other.layer, other.distance, other.guess(x, moe, most))


@dataclass(frozen=True)
class MoeFfn:
    """Top-k of E gated experts, and a shared one beside them where the family has it."""

    layer: int
    moe: MoeConfig
    router: torch.Tensor  # float32 [E, d]
    router_bias: torch.Tensor | None
    cache: ExpertCache
    layouts: tuple[ExpertLayout, ...]  # by expert
    act: str
    shared: DenseFfn | None
    shared_gate: torch.Tensor | None  # float32 [1, d]
    ahead: tuple[Ahead, ...] = ()
    bias: CacheBias | None = None
    degrade: float = 0.0  # of a token's weights: what has less is served from its small copy where it is not here
    group_router: torch.Tensor | None = None  # float32 [G, d], of two levels of gating
    worth: tuple[torch.Tensor, torch.Tensor] | None = None  # [E, d] and [E]: hidden state -> expected uses to come

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]. Outputs are summed in the order of rank, whatever order the experts arrive in."""
        with rt.recorder.computing():
            logits = rt.apart(lambda row: F.linear(row, self.router, self.router_bias), x)
        if rt.mode.here:
            return self._draft(x, logits, rt)
        with rt.recorder.computing():
            weights, chosen = self._route(x, logits, rt)
            by_rank = x.new_empty(*chosen.shape, x.shape[-1])
            asked = chosen.cpu().numpy()
            if self.moe.num_noop_experts:  # those behind the experts ask for nothing and add nothing
                asked = np.where(asked < self.moe.num_experts, asked, -1)
                by_rank.zero_()
        small: list[int] = []
        if self.degrade and rt.recorder.phase == "decode":
            small = self._light(asked, weights.cpu().numpy())
            asked = np.where(np.isin(asked, small), -1, asked)
            chosen = torch.where(torch.isin(chosen, chosen.new_tensor(small)), chosen + self.moe.num_experts, chosen)
        if self.worth is not None and self.cache.foresees:
            with rt.recorder.computing():
                self.cache.expect(self.layer, F.linear(x[-1], *self.worth))
        arriving = self.cache.fetch(self.layer, asked, small)
        if self.cache.distances:
            with rt.recorder.computing():
                guess_ahead(self.ahead, x, self.moe, self.cache)
        extra = self._shared(x, rt)  # while experts are on their way
        if len(x) == 1:
            by_rank = self._one(x, arriving, chosen[0].tolist(), by_rank, rt)
        else:
            for expert, pieces in arriving:
                with rt.recorder.computing():
                    token, rank = (chosen == expert).nonzero(as_tuple=True)
                    by_rank[token, rank] = self._expert(x[token], self.layouts[expert], pieces, rt)
        with rt.recorder.computing():
            out = (by_rank * weights[..., None]).sum(1)
        return out if extra is None else out.add_(extra)

    def _one(
        self, x: torch.Tensor, arriving: Arrivals, chosen: list[int], by_rank: torch.Tensor, rt: Runtime
    ) -> torch.Tensor:
        """What the experts of one token make, [1, k, d], in by_rank or in its place: those that are in memory are
        computed together, where they allow it, then together what has come meanwhile."""
        ranks = {expert: rank for rank, expert in enumerate(chosen)}
        outputs, places = [], []
        for found in arriving.batches():
            with rt.recorder.computing():
                for group, alike in self._groups(found):
                    group.sort(key=lambda one: ranks[one[0]])
                    layouts, pieces = [self.layouts[expert] for expert, _ in group], [each for _, each in group]
                    if alike:
                        outputs.append(apply_experts(x, layouts, pieces, self.act, self.moe, rt))
                    else:
                        outputs += [self._expert(x, *each, rt) for each in zip(layouts, pieces, strict=True)]
                    places += [ranks[expert] for expert, _ in group]
        if len(outputs) == 1 and len(places) == len(chosen):
            return outputs[0][None]
        if places:
            with rt.recorder.computing():
                by_rank[0, places] = torch.cat(outputs)
        return by_rank

    def _groups(self, found: list[tuple[int, Pieces]]) -> list[tuple[list[tuple[int, Pieces]], bool]]:
        """Experts as they are, and their small copies; and whether those of a group can be computed together."""
        count = self.moe.num_experts
        whole, small = [one for one in found if one[0] < count], [one for one in found if one[0] >= count]
        return [(group, alike) for group, alike in zip((whole, small), self._alike, strict=True) if group]

    @cached_property
    def _alike(self) -> tuple[bool, bool]:
        """Are all experts of one shape and format that `together` takes, and are all small copies."""
        count = self.moe.num_experts
        return together(self.layouts[:count]), len(self.layouts) > count and together(self.layouts[count:])

    def _draft(self, x: torch.Tensor, logits: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """The output [1, d] as far as memory goes: the best of the experts that are here take the others' places."""
        found = self.cache.here(self.layer)
        away = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        away[[*found, *range(self.moe.num_experts, logits.shape[-1])]] = False
        out = torch.zeros_like(x)
        weights, chosen = self._true_route(x, logits.masked_fill(away, float("-inf")), rt)
        for weight, expert in zip(weights[0].tolist(), chosen[0].tolist(), strict=True):
            if expert in found and weight > 0:
                out += weight * self._expert(x, self.layouts[expert], found[expert], rt)
        extra = self._shared(x, rt)
        return out if extra is None else out.add_(extra)

    def _light(self, asked: np.ndarray, weights: np.ndarray) -> list[int]:
        """Experts of asked [T, k] that are not here and have less than `degrade` of every token's weights [T, k]."""
        wanted = asked >= 0
        held = self.cache.policy.held(self.layer)[np.where(wanted, asked, 0)]
        heavy = held | (weights >= self.degrade * weights.sum(-1, keepdims=True))
        return sorted({*asked[wanted & ~heavy].tolist()} - {*asked[wanted & heavy].tolist()})

    def _true_route(self, x: torch.Tensor, logits: torch.Tensor, rt: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
        group_router = self.group_router
        if group_router is None:
            return route(logits, self.moe)
        return route_groups(rt.apart(lambda row: F.linear(row, group_router), x), logits, self.moe)

    def _route(self, x: torch.Tensor, logits: torch.Tensor, rt: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
        if self.bias is None or rt.recorder.phase != "decode":
            return self._true_route(x, logits, rt)
        held = torch.ones(logits.shape[-1], dtype=torch.bool)  # a choice that computes nothing costs no read either
        held[: self.moe.num_experts] = torch.from_numpy(self.cache.policy.held(self.layer))
        return self.bias.route(logits, held.to(logits.device), self.moe)

    def _shared(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor | None:
        if self.shared is None:
            return None
        extra = self.shared(x, rt)
        if self.shared_gate is not None:
            gate = self.shared_gate
            extra *= rt.apart(lambda row: torch.sigmoid(F.linear(row, gate)), x)
        return extra

    def _expert(self, x: torch.Tensor, layout: ExpertLayout, pieces: Pieces, rt: Runtime) -> torch.Tensor:
        return apply_expert(x, layout, pieces, self.act, self.moe, rt)
