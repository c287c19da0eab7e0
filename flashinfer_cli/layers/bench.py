"""Places in memory that the programs of a model's blocks share."""

from __future__ import annotations

import numpy as np
import torch

from .rope import Rope


class Bench:
    """Places that the blocks of a model share: float32 rows by name and width, the position, the neurons named."""

    def __init__(self) -> None:
        self.held = np.zeros(1, np.int64)  # the token's position
        self.found = np.zeros(1, np.int64)  # neurons named
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._ids: dict[int, np.ndarray] = {}
        self._turns: dict[Rope, tuple[tuple[int, int] | None, torch.Tensor, torch.Tensor]] = {}

    def row(self, name: str, width: int) -> torch.Tensor:
        """float32 [1, width], always the same one."""
        if (name, width) not in self._rows:
            with torch.inference_mode(False):
                self._rows[name, width] = torch.zeros(1, width)
        return self._rows[name, width]

    def ids(self, count: int) -> np.ndarray:
        """int64, for so many ids and one more."""
        if count not in self._ids:
            self._ids[count] = np.zeros(count + 1, np.int64)
        return self._ids[count]

    def turn(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the cosines and sines of the position stand."""
        if rope not in self._turns:
            cos, sin = (self.row(f"{name} {len(self._turns)}", rope.rotary_dim // 2)[0] for name in ("cos", "sin"))
            self._turns[rope] = (None, cos, sin)
        return self._turns[rope][1:]

    def set(self, position: int, rope: Rope | None, rope_length: int) -> None:
        """The token stands at `position`."""
        self.held[0] = position
        if rope is not None:
            asked, cos, sin = self._turns[rope]
            if asked != (position, rope_length):
                here = rope.run(position, 1, rope_length)
                cos.copy_(here[0][0])
                sin.copy_(here[1][0])
                self._turns[rope] = ((position, rope_length), cos, sin)
