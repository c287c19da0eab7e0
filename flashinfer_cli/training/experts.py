"""The sparsely-gated layer (1701.06538) as a module, its gate flat or in two levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.activations import ACTIVATIONS
from . import gating
from .common import Aux
from .shape import Shape


class MoeFfn(nn.Module):
    """Top-k of E experts; choices past `num_experts` are no-ops and add nothing (2404.02258).

    With `num_expert_groups` a primary gate chooses groups, and each chosen group's own gate experts inside of it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        experts, width, inner = shape.num_experts, shape.hidden_size, shape.moe_intermediate_size
        choices = experts + shape.num_noop_experts
        self.gate = nn.Parameter(torch.zeros(choices, width))  # W_g and W_n start at zero: equal and noisy
        self.noise = nn.Parameter(torch.zeros(choices, width))
        if shape.num_expert_groups:
            self.group_gate = nn.Parameter(torch.zeros(shape.num_expert_groups, width))
            self.group_noise = nn.Parameter(torch.zeros(shape.num_expert_groups, width))
        self.w1 = nn.Parameter(torch.empty(experts, inner, width))
        if shape.gated:
            self.w3 = nn.Parameter(torch.empty(experts, inner, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, inner))
        self.act = ACTIVATIONS[shape.hidden_act]
        self.noisy = True  # the gate draws noise while training; a checkpoint does not keep how much

    def _gates(self, wide: torch.Tensor) -> gating.Gates:
        """x float32 [T, d] -> who computes it."""
        shape, noisy = self.shape, self.training and self.noisy
        noise = F.linear(wide, self.noise) if noisy else None
        clean = F.linear(wide, self.gate)
        if not shape.num_expert_groups:
            return gating.noisy_top_k(clean, noise, shape.num_experts_per_tok)
        return gating.two_levels(
            F.linear(wide, self.group_gate), F.linear(wide, self.group_noise) if noisy else None, clean, noise,
            shape.gate_groups_per_tok, shape.num_experts_per_tok // shape.gate_groups_per_tok,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, aux: Aux) -> torch.Tensor:
        shape, flat = self.shape, x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # the gate is decided in float32
            gates = self._gates(flat.float())
        aux.importance.append(gating.importance_loss(gates))
        aux.load.append(gating.load_loss(gates))
        aux.chosen.append((gates.dense > 0).float().sum(0).detach())
        order = gates.experts.flatten().argsort(stable=True)  # by expert, tokens in order
        counts = torch.bincount(gates.experts.flatten(), minlength=self.gate.shape[0]).tolist()
        token = order // shape.num_experts_per_tok
        outs = []
        sorted_x = flat[token].split(counts)
        for e in range(shape.num_experts):
            h = self.act(F.linear(sorted_x[e], self.w1[e]))
            outs.append(F.linear(h * F.linear(sorted_x[e], self.w3[e]) if shape.gated else h, self.w2[e]))
        real = sum(counts[: shape.num_experts])
        scaled = torch.cat(outs) * gates.weights.flatten()[order[:real], None]
        return torch.zeros_like(scaled[:1]).expand_as(flat).index_add(0, token[:real], scaled).view_as(x)
