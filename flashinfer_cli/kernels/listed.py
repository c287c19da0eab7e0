"""Records that stand anywhere in memory, by their addresses: computed on where they are, not copied side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Listed:
    """`addresses` int64 [n], of records of `width` bytes that stand in rows of `memory`, uint8 arrays [rows, width]."""

    addresses: np.ndarray
    width: int
    memory: tuple[np.ndarray, ...]

    def gather(self) -> torch.Tensor:
        """Copies of them side by side, uint8 [n, width]: for kernels that cannot follow addresses."""
        out = np.empty((len(self.addresses), self.width), np.uint8)
        for rows in self.memory:
            place = self.addresses - rows.ctypes.data
            mine = (place >= 0) & (place < rows.nbytes)
            out[mine] = rows[place[mine] // self.width]
        return torch.from_numpy(out)
