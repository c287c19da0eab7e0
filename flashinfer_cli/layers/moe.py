"""The sparsely-gated mixture of experts (1701.06538), its experts in the expert cache (2312.17238)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cache.experts import ExpertCache
from ..config import MoeConfig
from ..kernels.activations import ACTIVATIONS
from .ffn import DenseFfn
from .linear import Runtime


@dataclass(frozen=True)
class ExpertPart:
    """A matrix [rows, cols] of an expert: `nbytes` bytes from `offset` on in one of its pieces."""

    piece: int
    offset: int
    nbytes: int
    rows: int
    cols: int
    format: str


@dataclass(frozen=True)
class ExpertLayout:
    """Where an expert's three matrices stand in its pieces."""

    gate: ExpertPart
    up: ExpertPart
    down: ExpertPart


def route(logits: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (weights [T, k], experts [T, k]): softmax over all, then the k largest."""
    weights, experts = logits.softmax(-1).topk(moe.num_experts_per_tok, dim=-1)
    if moe.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


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

    def __call__(self, x: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """x [T, d] -> [T, d]. Outputs are summed in the order of rank, whatever order the experts arrive in."""
        with rt.recorder.computing():
            logits = torch.nn.functional.linear(x, self.router, self.router_bias)
            weights, chosen = route(logits, self.moe)
            by_rank = x.new_empty(*chosen.shape, x.shape[-1])
            needed = torch.unique(chosen).tolist()
            if self.moe.num_noop_experts:  # those behind the experts ask for nothing and add nothing
                needed = [e for e in needed if e < self.moe.num_experts]
                by_rank.zero_()
        for expert, pieces in self.cache.fetch(self.layer, needed):
            with rt.recorder.computing():
                token, rank = (chosen == expert).nonzero(as_tuple=True)
                by_rank[token, rank] = self._expert(x[token], self.layouts[expert], pieces, rt)
        with rt.recorder.computing():
            out = (by_rank * weights[..., None]).sum(1)
        if self.shared is not None:
            extra = self.shared(x, rt)
            if self.shared_gate is not None:
                extra *= torch.sigmoid(torch.nn.functional.linear(x, self.shared_gate))
            out += extra
        return out

    def _expert(self, x: torch.Tensor, layout: ExpertLayout, pieces: list[torch.Tensor], rt: Runtime) -> torch.Tensor:
        def times(x: torch.Tensor, part: ExpertPart) -> torch.Tensor:
            weight = pieces[part.piece][part.offset : part.offset + part.nbytes].view(part.rows, -1)
            out = x.new_empty(x.shape[0], part.rows)
            rt.kernels.linear(x, weight, part.format, out, 0)
            return out

        h = ACTIVATIONS[self.act](times(x, layout.gate)).mul_(times(x, layout.up))
        return times(h, layout.down)
