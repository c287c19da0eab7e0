"""Noisy top-k gating and the two losses that keep experts in use (1701.06538, section 4 and appendix A)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Gates(NamedTuple):
    """What the gate says of T tokens: `weights` and `experts` [T, k], and the losses' inputs, [T, E] each."""

    weights: torch.Tensor  # softmax over the k kept
    experts: torch.Tensor  # int64, best first
    dense: torch.Tensor  # the gates G: `weights` at `experts`, zero elsewhere
    load: torch.Tensor  # P(x, i): how likely expert i is kept if its own noise were drawn again


def cv_squared(x: torch.Tensor) -> torch.Tensor:
    """The square of the coefficient of variation, variance / mean^2, of a vector; 0 when it has one entry."""
    if x.numel() < 2:
        return x.new_zeros(())
    return x.var(correction=0) / (x.mean().square() + 1e-10)


def keep_probability(clean: torch.Tensor, noisy: torch.Tensor, scale: torch.Tensor, k: int) -> torch.Tensor:
    """P(x, i) = Phi((clean_i - kth_excluding(noisy, k, i)) / scale_i), all [T, E].

    kth_excluding is the k-th largest of the *noisy logits* (not of their softmax) with i left out: the (k+1)-th of all
    where i is among the top k, else the k-th. Where k = E every expert is kept for certain.
    """
    if k >= noisy.shape[-1]:
        return torch.ones_like(noisy)
    top = noisy.topk(k + 1, dim=-1).values
    kth, following = top[..., k - 1 : k], top[..., k : k + 1]
    threshold = torch.where(noisy >= kth, following, kth)
    return 0.5 * (1 + torch.erf((clean - threshold) / (scale * math.sqrt(2))))


def noisy_top_k(
    clean: torch.Tensor, noise_logits: torch.Tensor | None, k: int, *, noise: torch.Tensor | None = None
) -> Gates:
    """G = softmax(KeepTopK(H, k)) with H = clean + noise * softplus(noise_logits); all [T, E] float32.

    `noise` is standard normal, drawn here unless given; no `noise_logits` means no noise (inference), and then the load
    is simply who was chosen, which has no gradient.
    """
    if noise_logits is None:
        noisy = clean
    else:
        scale = F.softplus(noise_logits)
        noisy = clean + (torch.randn_like(clean) if noise is None else noise) * scale
    kept, experts = noisy.topk(k, dim=-1)
    weights = kept.softmax(-1)
    dense = torch.zeros_like(noisy).scatter(-1, experts, weights)
    if noise_logits is None:
        load = (dense > 0).to(clean.dtype)
    else:
        load = keep_probability(clean, noisy, scale, k)
    return Gates(weights, experts, dense, load)


def two_levels(
    primary: torch.Tensor,
    primary_noise: torch.Tensor | None,
    inner: torch.Tensor,
    inner_noise: torch.Tensor | None,
    groups: int,
    experts: int,
) -> Gates:
    """Hierarchical gating (appendix B): `groups` of G by primary logits [T, G], `experts` of each by inner [T, E].

    A weight is the product of the two gates. `load` is [1, E], summed over the tokens already: the primary gate's load
    of a group times the share of that group's tokens that an expert is likely to get.
    """
    tokens, count = primary.shape
    first = noisy_top_k(primary, primary_noise, groups)
    inside = inner.view(tokens, count, -1)
    noise = None if inner_noise is None else inner_noise.view_as(inside)
    second = noisy_top_k(inside, noise, experts)  # of every group; the chosen ones are picked below
    rows = first.experts[..., None].expand(-1, -1, experts)  # [T, groups, experts]
    weights = first.weights[..., None] * second.weights.gather(1, rows)
    numbers = second.experts.gather(1, rows) + first.experts[..., None] * inside.shape[-1]
    dense = first.dense[..., None] * second.dense
    asked = (first.dense > 0).to(inner.dtype)  # the tokens X^(i) of each group
    share = torch.einsum("tg,tge->ge", asked, second.load) / asked.sum(0).clamp_min(1)[:, None]
    load = first.load.sum(0)[:, None] * share
    return Gates(weights.flatten(1), numbers.flatten(1), dense.flatten(1), load.reshape(1, -1))


def importance_loss(gates: Gates) -> torch.Tensor:
    """CV(sum over tokens of G)^2: experts should matter alike."""
    return cv_squared(gates.dense.sum(0))


def load_loss(gates: Gates) -> torch.Tensor:
    """CV(sum over tokens of P)^2: experts should be chosen alike often."""
    return cv_squared(gates.load.sum(0))
