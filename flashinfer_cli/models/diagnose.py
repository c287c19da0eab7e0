"""When a model's output is not a number: find the tensor that is to blame."""

from __future__ import annotations

import numpy as np
import torch

from ..checkpoint.base import Checkpoint
from ..checkpoint.rows import read_rows
from ..config import MiB
from ..errors import CorruptCheckpointError
from ..kernels import Kernels


def check_finite(logits: torch.Tensor, checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Raises CorruptCheckpointError, naming the tensor at fault where there is one, when logits are not numbers."""
    if torch.isnan(logits).any():
        name = first_bad_tensor(checkpoint, kernels)
        where = f"tensor '{name}' holds NaN or infinite values" if name else "an activation overflowed"
        raise CorruptCheckpointError(f"The model's output is not a number: {where}.")


def first_bad_tensor(checkpoint: Checkpoint, kernels: Kernels) -> str | None:
    """Name of the first tensor, in file order, that holds NaN or infinite values; reads until it is found."""
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: (str(item[1].path), item[1].offset)):
        step = max(1, MiB // max(info.row_bytes, 1))
        for start in range(0, info.num_rows, step):
            rows = min(step, info.num_rows - start)
            raw = torch.from_numpy(np.array(read_rows(info, start, rows))).view(rows, -1)
            if info.format == "U8":  # records of several formats, or MXFP4 apart, of whose scales one byte means NaN
                if name.endswith("_scales") and bool((raw == 255).any()):
                    return name
                continue
            if not torch.isfinite(kernels.dequantize(raw, info.format, info.cols)).all():
                return name
    return None
