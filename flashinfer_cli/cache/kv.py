"""Keys and values of one sequence, in memory reserved once for the whole context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from ..config import ModelConfig
from ..errors import ContextError
from ..kernels.kept import DTYPES, keep, kept_width


class KVCache:
    """Per layer [num_key_value_heads, capacity, head_dim], filled up to `length`, in a format of `kernels.kept`. `trim`
    rewinds (speculation). With latent attention keys are [1, capacity, kv_lora_rank + qk_rope_head_dim], values empty.

    A layer that tokens may skip holds those that did not, and their positions in the sequence.
    """

    def __init__(self, config: ModelConfig, capacity: int, device: str, fmt: str = "F32") -> None:
        self.capacity = capacity
        self.length = 0
        self.format = fmt
        heads, *widths = config.kv_shape
        self.keys, self.values = (
            [
                torch.empty((heads, capacity, kept_width(fmt, width)), dtype=DTYPES[fmt], device=device)
                for _ in range(config.num_hidden_layers)
            ]
            for width in widths
        )
        self._positions: dict[int, list[int]] = {
            layer: [] for layer in range(config.num_hidden_layers) if config.is_skippable(layer)
        }

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

    def held(self, layer: int) -> int:
        """How many tokens the layer has keys and values of."""
        return len(self._positions[layer]) if layer in self._positions else self.length

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write float32 [kv_heads, T, head_dim] behind what the layer holds and return all of its keys and values as
        they are kept, as views.

        `positions` are those of the T tokens where the layer may be skipped. `length` moves only when every layer has
        had its turn (`advance`).
        """
        start = self.held(layer)
        if positions is not None:
            self._positions[layer] += positions
        end = start + keys.shape[1]
        self.keys[layer][:, start:end] = keep(keys, self.format)
        self.values[layer][:, start:end] = keep(values, self.format)
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def move(self, source: int, place: int) -> None:
        """Copy one position's keys and values to another, where no layer may be skipped."""
        assert not self._positions
        for kept in (*self.keys, *self.values):
            kept[:, place] = kept[:, source]

    def trim(self, length: int) -> None:
        """Forget everything from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length
        for positions in self._positions.values():
            del positions[bisect_left(positions, length) :]
