"""The predictors of a calibrated bundle, ready to say which neurons a token needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..bundles.quantize import quantize
from ..bundles.sparsity import PREDICTORS_FILE
from ..device import Device, allocate
from ..errors import BundleError
from ..kernels import Kernels
from ..layers.demand import Demand, LowRankPredictor, Stored

Q8_BLOCK = 32  # elements


def load_predictors(bundle: Path, layers: Iterable[int], kernels: Kernels, device: Device) -> dict[int, Demand]:
    """One for each of `layers`, rounded to 8 bits where their shapes allow it. Raises BundleError for a file that lacks
    any.

    They take memory that neurons and attention could have, and their scores need no more: the quality that calibration
    states is that of the rounded ones.
    """
    file, layers = bundle / PREDICTORS_FILE, list(layers)
    found: dict[int, Demand] = {}
    if not layers:
        return found
    try:
        with safe_open(file, framework="np") as tensors:
            for layer in layers:
                a, b, bias = (tensors.get_tensor(f"layers.{layer}.{part}") for part in ("a", "b", "bias"))
                found[layer] = LowRankPredictor(
                    _stored(a, device), _stored(b, device), device.put(torch.from_numpy(np.float32(bias))), kernels
                )
    except (SafetensorError, OSError, OverflowError) as error:
        raise BundleError(f"{file} cannot be read: {error}.", "Calibrate the bundle again.") from None
    return found


def _stored(matrix: np.ndarray, device: Device) -> Stored:
    """A matrix in memory of its own, as large pages where it is large: a file's mapping would count twice."""
    fmt = "F16" if matrix.shape[1] % Q8_BLOCK else "Q8_0"
    raw = matrix.astype(np.float16) if fmt == "F16" else quantize(matrix.astype(np.float32), fmt, "nearest")
    rows = allocate(raw.nbytes)
    rows[:] = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    return Stored(device.put(torch.from_numpy(rows.reshape(len(matrix), -1))), fmt)
