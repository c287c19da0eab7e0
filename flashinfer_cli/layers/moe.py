"""The sparsely-gated mixture of experts (1701.06538), its experts in the expert cache (2312.17238)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from ..cache.arrivals import Arrivals, Pieces
from ..cache.experts import ExpertCache
from ..config import MoeConfig
from ..store.spans import Span
from .expert import ExpertLayout, ExpertPart, apply_expert, apply_experts, together
from .expert_stage import Stage
from .ffn import DenseFfn
from .linear import Runtime
from .norm import Norm
from .routing import CacheBias, CacheGap, other_groups, route, route_groups

SUMMED = 64  # tokens whose outputs by rank are weighed and added up at a time: of a long prompt they take as much again


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
    rule: CacheBias | CacheGap | None = None  # by which that layer chooses

    def guess(self, x: torch.Tensor, moe: MoeConfig, most: int, held: np.ndarray | None = None) -> list[int]:
        """x [T, d] -> the experts that the tokens will want, at most `most`, best first. With `held`, bool [experts],
        those of one token that will find no stand-in there."""
        logits = F.linear(x if self.scale is None else x * self.scale, self.router, self.router_bias)
        if moe.num_groups > 1:
            logits = logits.masked_fill(other_groups(logits, moe), float("-inf"))
        if len(x) == 1 and held is not None and isinstance(self.rule, CacheGap):
            best = self.rule.choose(logits.softmax(-1), here_of(held, logits), moe)[0]
        elif len(x) == 1:
            best = logits[0].topk(min(most, logits.shape[-1])).indices.tolist()
        else:
            picked = logits.topk(moe.num_experts_per_tok, dim=-1).indices.flatten()
            wanted = torch.bincount(picked, minlength=moe.num_experts)
            order = wanted.argsort(descending=True, stable=True)[:most]
            best = order[wanted[order] > 0].tolist()
        return [e for e in best if e < moe.num_experts]


def here_of(held: np.ndarray, logits: torch.Tensor) -> list[bool]:
    """What costs no read, [E]: experts that are here, and choices behind the experts, which compute nothing."""
    here: list[bool] = held.tolist()
    return here + [True] * (logits.shape[-1] - len(here))


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
    chosen_by_rule = cache.recorder.phase == "decode" and cache.trace is None
    most = max(cache.guessing.most, moe.num_experts_per_tok)
    if cache.trace is not None:
        most = max(most, min(moe.num_experts, 4 * moe.num_experts_per_tok))
    for other in ahead:
        if other.distance in cache.distances:
            held = cache.policy.held(other.layer) if chosen_by_rule else None
            cache.guess(other.layer, other.distance, other.guess(x, moe, most, held))


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
    bias: CacheBias | CacheGap | None = None
    degrade: float = 0.0  # of a token's weights: what has less is served from its small copy where it is not here
    group_router: torch.Tensor | None = None  # float32 [G, d], of two levels of gating
    worth: tuple[torch.Tensor, torch.Tensor] | None = None  # [E, d] and [E]: hidden state -> uses to come, as learned
    stage: Stage | None = None  # where one token's experts are computed together; None: expert by expert, or as tensors

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]. Outputs are summed in the order of rank, whatever order the experts arrive in."""
        with rt.recorder.computing():
            logits = rt.apart(lambda row: F.linear(row, self.router, self.router_bias), x)
        if rt.mode.here:
            return self._draft(x, logits, rt)
        with rt.recorder.computing():
            weights, chosen = self._route(x, logits, rt)
            asked = chosen.cpu().numpy()
            if self.moe.num_noop_experts:  # those behind the experts ask for nothing and add nothing
                asked = np.where(asked < self.moe.num_experts, asked, -1)
        small: list[int] = []
        if self.degrade and rt.recorder.phase == "decode":
            small = self._light(asked, weights.cpu().numpy())
            asked = np.where(np.isin(asked, small), -1, asked)
            chosen = torch.where(torch.isin(chosen, chosen.new_tensor(small)), chosen + self.moe.num_experts, chosen)
        if self.cache.foresees:
            with rt.recorder.computing():
                self._foresee(x[-1], logits[-1])
        arriving = self.cache.fetch(self.layer, asked, small)
        staged = len(x) == 1 and self.stage is not None and not small
        later = staged and arriving.busy  # what is here is computed first, while the drive has enough to do
        if not later:
            self._guess(x, rt)
        extra = self._shared(x, rt)  # while experts are on their way
        if staged:
            assert self.stage is not None
            by_rank = self._staged(self.stage, x, arriving, asked[0].tolist(), rt, later)
        elif len(x) == 1:
            by_rank = self._one(x, arriving, chosen[0].tolist(), rt)
        else:
            by_rank = self._empty(x, chosen)
            for expert, pieces in arriving:
                with rt.recorder.computing():
                    token, rank = (chosen == expert).nonzero(as_tuple=True)
                    by_rank[token, rank] = self._expert(x[token], self.layouts[expert], pieces, rt)
        with rt.recorder.computing():
            parts = zip(by_rank.split(SUMMED), weights[..., None].split(SUMMED), strict=True)
            sums = [(rows * factors).sum(1) for rows, factors in parts]
            out = sums[0] if len(sums) == 1 else torch.cat(sums)
        return out if extra is None else out.add_(extra)

    def _foresee(self, x: torch.Tensor, logits: torch.Tensor) -> None:
        """Tell the cache what each expert is worth to tokens behind one of x [d], for which the router says logits [E]:
        as calibration learned, else as if the next token were like this one."""
        if self.worth is not None:
            self.cache.expect(self.layer, F.linear(x, *self.worth))
        elif not self.moe.gate_groups:
            self.cache.expect(self.layer, logits.softmax(-1)[: self.moe.num_experts])

    def _empty(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Room for what the experts chosen [T, k] make of x, [T, k, d]; zeros where some may compute nothing."""
        make = x.new_zeros if self.moe.num_noop_experts else x.new_empty
        return make(*chosen.shape, x.shape[-1])

    def _guess(self, x: torch.Tensor, rt: Runtime) -> None:
        if self.cache.distances:
            with rt.recorder.computing():
                guess_ahead(self.ahead, x, self.moe, self.cache)

    def _staged(
        self, stage: Stage, x: torch.Tensor, arriving: Arrivals, asked: list[int], rt: Runtime, guess: bool
    ) -> torch.Tensor:
        """What the experts of one token make, [1, k, d], zeros for -1: those that are in memory are computed together,
        then together what has come meanwhile, with the `guess` of layers ahead between. It stands where the next
        layer's will."""
        ranks = {expert: rank for rank, expert in enumerate(asked)}
        order: list[int] = []
        address, width, places = self.cache.address, self.cache.slot_bytes, self._places
        for found in arriving.slots():
            with rt.recorder.computing():
                if not order:
                    stage.x.copy_(x)
                found.sort(key=lambda one: ranks[one[0]])
                gates, ups, downs = [], [], []
                for expert, slot in found:
                    start, (gate, up, down) = address + slot * width, places[expert]
                    gates.append(start + gate)
                    ups.append(start + up)
                    downs.append(start + down)
                stage.compute(len(order), gates, ups, downs)
                order += [ranks[expert] for expert, _ in found]
            if guess:
                self._guess(x, rt)
                guess = False
        made, k = stage.out, len(asked)
        if order == list(range(k)):
            return made[None, :k]
        with rt.recorder.computing():
            by_rank = x.new_empty(1, k, x.shape[-1]) if len(order) == k else x.new_zeros(1, k, x.shape[-1])
            by_rank[0].index_copy_(0, torch.tensor(order), made[: len(order)])
        return by_rank

    @cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """Of every expert, where its gate, up and down stand in its slot."""

        def place(span: Span, part: ExpertPart) -> int:
            return span.starts[part.piece] + part.offset

        spans = self.cache.spans[self.layer]
        return [
            (place(span, layout["gate"]), place(span, layout["up"]), place(span, layout["down"]))
            for span, layout in zip(spans, self.layouts, strict=True)
        ]

    def _one(self, x: torch.Tensor, arriving: Arrivals, chosen: list[int], rt: Runtime) -> torch.Tensor:
        """The same where there is no stage for it: together as far as they allow it."""
        by_rank = self._empty(x, torch.empty(1, len(chosen)))
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
        here = here_of(self.cache.policy.held(self.layer), logits)
        return self.bias.route(logits, torch.tensor(here, device=logits.device), self.moe)

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
