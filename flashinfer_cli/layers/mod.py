"""Mixture-of-Depths (2404.02258): who decides, token by token, whether a block computes anything at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .linear import Runtime


@dataclass(frozen=True)
class Predictor:
    """A small MLP that learned, behind a stop-gradient, whom the top-k of a whole sequence would choose."""

    hidden: torch.Tensor  # float32 [h, d]
    hidden_bias: torch.Tensor  # [h]
    out: torch.Tensor  # [1, h]
    out_bias: torch.Tensor  # [1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, d] -> logits [T]."""
        return F.linear(F.relu(F.linear(x, self.hidden, self.hidden_bias)), self.out, self.out_bias)[:, 0]


@dataclass(frozen=True)
class TokenRouter:
    """The router of a block: a weight for each token, and the causal decision, which sees no other token.

    At decoding a top-k over the tokens at hand would be no choice at all (one of one); so the router itself decides,
    trained to be positive for whom it would have chosen, or the predictor does.
    """

    router: torch.Tensor  # float32 [1, d]
    predictor: Predictor | None  # None: the router decides

    def __call__(self, x: torch.Tensor, rt: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, d] -> (weights r [T], positions in x of those that are computed, int64 in order)."""
        weights = rt.apart(lambda row: F.linear(row, self.router)[:, 0], x)
        decisions = weights if self.predictor is None else rt.apart(self.predictor, x)
        return weights, (decisions > 0).nonzero()[:, 0]
