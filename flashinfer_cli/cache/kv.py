"""Keys and values of one sequence, in memory reserved once for the whole context."""

from __future__ import annotations

import torch

from ..config import ModelConfig
from ..errors import ContextError


class KVCache:
    """Per layer float32 [num_key_value_heads, capacity, head_dim], filled up to `length`. `trim` rewinds
    (speculation)."""

    def __init__(self, config: ModelConfig, capacity: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.capacity = capacity
        self.length = 0
        shape = (config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def check_room(self, tokens: int) -> None:
        """Raises ContextError when `tokens` more do not fit."""
        if self.length + tokens > self.capacity:
            raise ContextError(
                f"{self.length + tokens} tokens do not fit a context of {self.capacity}.",
                f"Shorten the prompt or the answer, or give --context {self.length + tokens}.",
            )

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [kv_heads, T, head_dim] behind `length` and return all keys and values so far, as views.

        `length` moves only when every layer has written (`advance`).
        """
        end = self.length + keys.shape[1]
        self.keys[layer][:, self.length : end] = keys
        self.values[layer][:, self.length : end] = values
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def trim(self, length: int) -> None:
        """Forget everything from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length
