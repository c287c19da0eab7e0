"""What all our trained modules share: the norm, and what a forward pass leaves beside its logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .shape import Shape


@dataclass
class Aux:
    """What a forward pass leaves beside its logits, a list entry a layer."""

    importance: list[torch.Tensor] = field(default_factory=list)
    load: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)  # float32 [E + noop]: how often each expert was chosen
    router_loss: list[torch.Tensor] = field(default_factory=list)
    predictor_loss: list[torch.Tensor] = field(default_factory=list)
    router_agreement: list[torch.Tensor] = field(default_factory=list)
    predictor_agreement: list[torch.Tensor] = field(default_factory=list)
    computed: list[torch.Tensor] = field(default_factory=list)  # share of the tokens a MoD block computed
    magnitude: list[torch.Tensor] = field(default_factory=list)  # L1 of an FFN's act(gate) * up over its own scale
    active: list[torch.Tensor] = field(default_factory=list)  # share of its neurons that are not zero


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
