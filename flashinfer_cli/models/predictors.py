"""The predictors of a calibrated bundle, ready to say which neurons a token needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..bundles.sparsity import PREDICTORS_FILE
from ..device import Device
from ..errors import BundleError
from ..kernels import Kernels
from ..layers.demand import Demand, LowRankPredictor


def load_predictors(bundle: Path, layers: Iterable[int], kernels: Kernels, device: Device) -> dict[int, Demand]:
    """One for each of `layers`, float16 matrices as they are stored. Raises BundleError for a file that lacks any."""
    file, layers = bundle / PREDICTORS_FILE, list(layers)
    found: dict[int, Demand] = {}
    if not layers:
        return found
    try:
        with safe_open(file, framework="pt") as tensors:
            for layer in layers:
                a, b, bias = (tensors.get_tensor(f"layers.{layer}.{part}") for part in ("a", "b", "bias"))
                found[layer] = LowRankPredictor(
                    device.put(a.contiguous().view(torch.uint8)),
                    device.put(b.contiguous().view(torch.uint8)),
                    device.put(bias.float()),
                    kernels,
                )
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} cannot be read: {error}.", "Calibrate the bundle again.") from None
    return found
