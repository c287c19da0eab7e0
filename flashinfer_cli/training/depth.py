"""Mixture-of-Depths routing (2404.02258): a block computes only the tokens that its router ranks highest.

In training the choice is a top-k over the whole sequence, which no causal decoder can make. Two ways out, both learned
beside it: the router's own weight is pushed over zero exactly for the chosen (a binary cross-entropy), or a small
predictor behind a stop-gradient learns who will be chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def capacity_of(share: float, tokens: int) -> int:
    """How many of `tokens` a block takes at a capacity of `share` (0.125 in the paper); at least one."""
    return min(tokens, max(1, round(share * tokens)))


def choose(weights: torch.Tensor, capacity: int) -> torch.Tensor:
    """Router weights [B, T] -> positions of the `capacity` highest, int64 [B, capacity], in the order of the sequence.

    Exactly `capacity` of them, ties included: comparing with the k-th largest would lose one (>) or gain some (>=).
    """
    return weights.topk(capacity, dim=-1).indices.sort(-1).values


def chosen_mask(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions [B, C] -> float32 [B, tokens], one where chosen."""
    mask = torch.zeros(positions.shape[0], tokens, device=positions.device)
    return mask.scatter(1, positions, 1.0)


def take(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [B, T, d] at positions [B, C] -> [B, C, d]."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def mix(x: torch.Tensor, update: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x' = r * f(x) + x at the chosen positions, x elsewhere; r scales the block's output and never the residual.

    x [B, T, d], update f(x) [B, C, d], weights r [B, T], positions [B, C].
    """
    scaled = update * weights.gather(1, positions)[..., None]
    return x.scatter_add(1, positions[..., None].expand_as(scaled), scaled)


def causal_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits [B, T] against who was chosen: sigmoid > 1/2 becomes the causal decision."""
    return F.binary_cross_entropy_with_logits(logits.float(), mask)


def agreement(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The share of tokens for which the causal decision (logit > 0) is the top-k's."""
    return ((logits > 0) == (mask > 0)).float().mean()
