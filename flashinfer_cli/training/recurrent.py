"""A recurrent block (1701.06538, section 5.1): an LSTM, and behind all but the last of them experts."""

from __future__ import annotations

import torch
from torch import nn

from .common import Aux, RMSNorm
from .experts import MoeFfn
from .shape import Shape


class LstmBlock(nn.Module):
    """x + LSTM(norm x), then x + experts(norm x) where another LSTM follows. Every sequence starts from a zero state.

    The paper drops out, and normalizes nothing; we norm before, as the rest of the zoo does.
    """

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.lstm = nn.LSTM(shape.hidden_size, shape.hidden_size, batch_first=True)
        with torch.no_grad():  # one bias, its forget gate open
            given, other = (self.lstm.get_parameter(name) for name in ("bias_ih_l0", "bias_hh_l0"))
            given.zero_()
            given[shape.hidden_size : 2 * shape.hidden_size] = 1.0
            other.zero_()
            other.requires_grad_(False)
        self.has_experts = layer + 1 < shape.num_hidden_layers
        if self.has_experts:
            self.post_attention_layernorm = RMSNorm(shape)
            self.mlp = MoeFfn(shape)

    def update(self, x: torch.Tensor, aux: Aux) -> torch.Tensor:
        """What the block adds to x [B, T, d]."""
        h, _ = self.lstm(self.input_layernorm(x))
        return h + self.mlp(self.post_attention_layernorm(x + h), aux) if self.has_experts else h
