"""A long short-term memory in the place of attention: the recurrent layers of 1701.06538."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..cache.kv import KVCache
from .linear import Linear, Runtime


@dataclass(frozen=True)
class Lstm:
    """One layer. What it adds up goes through the sequence token by token, so a token's bits never depend on how many
    stand in a pass.

    The state behind every position is kept where attention keeps keys (h) and values (c): rewinding, as drafts ask for,
    is then exact, and costs the memory that one head of the model's width would.
    """

    layer: int
    input: Linear  # [4 d, d] with its bias: input, forget, cell, output, as torch orders them
    recurrent: torch.Tensor  # float32 [4 d, d]; always in memory, since every token of a pass needs it in turn

    @property
    def is_here(self) -> bool:
        """Are all of its weights in memory."""
        return self.input.is_here

    def __call__(
        self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, d], which follow what `kv` holds -> [T, d]. Positions mean nothing to it."""
        tokens, d = x.shape
        given = self.input(x, rt)
        with rt.recorder.computing():
            if kv.length:
                h, c = kv.keys[self.layer][0, kv.length - 1], kv.values[self.layer][0, kv.length - 1]
            else:
                h = c = x.new_zeros(d)
            out, cells = x.new_empty(tokens, d), x.new_empty(tokens, d)
            for t in range(tokens):
                i, f, g, o = (given[t] + F.linear(h, self.recurrent)).view(4, d)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                out[t], cells[t] = h, c
            kv.append(self.layer, out[None], cells[None])
        return out
