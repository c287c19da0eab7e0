"""The embedding table: rows read from flash by token, or taken from memory where the whole table stays."""

from __future__ import annotations

import torch

from ..checkpoint.base import TensorInfo
from .linear import Linear, Runtime

ROWS_AT_ONCE = 64  # rows read as one batch: enough requests in flight, little scratch


class Embedding:
    """`table` [vocab_size, d] on flash; `resident` the same rows as slices, used when all of them are pinned."""

    def __init__(self, table: TensorInfo, resident: Linear) -> None:
        self.table = table
        self.resident = resident

    @property
    def stays(self) -> bool:
        return all(s.home is not None for s in self.resident.slices)

    def __call__(self, ids: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """Token ids [T] -> float32 [T, d]."""
        if self.stays:
            with rt.recorder.computing():
                return self.resident.gather(ids, rt)
        wanted, back = torch.unique(ids, return_inverse=True)
        rows = torch.empty(len(wanted), self.table.cols, device=ids.device)
        for first in range(0, len(wanted), ROWS_AT_ONCE):
            batch = wanted[first : first + ROWS_AT_ONCE].tolist()
            with rt.recorder.waiting():
                found = rt.feed.store.read_now([self.table.rows(i, 1) for i in batch], "embedding")
            with rt.recorder.computing():
                raw = rt.feed.device.put(torch.stack([torch.from_numpy(row) for row in found]))
                rows[first : first + len(batch)] = rt.kernels.dequantize(raw, self.table.format, self.table.cols)
        return rows[back]
