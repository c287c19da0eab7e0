"""The predictors of a calibrated bundle: of every layer the matrices A and B in blocks of 8 or 4 bits, and a bias.

    predictors.safetensors   layers.L.a.FORMAT [r, bytes] and layers.L.b.FORMAT [d_ff, bytes], uint8 rows in a format of
                             `checkpoint.base.FORMATS`; layers.L.bias [d_ff], float32, with the threshold in it

They stand in memory that neurons and attention could have, and scores that are only compared with a threshold need few
bits. Calibration chooses them, and sets thresholds for the rounded matrices. Files of before 4 bits have layers.L.a and
layers.L.b in float16, which are rounded to 8 bits as they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..bundles.quantize import Quantize, format_of, quantize
from ..bundles.sparsity import predictor_tensor
from ..checkpoint.base import FORMATS
from ..device import Device, allocate
from ..errors import BundleError
from ..kernels import Kernels
from ..layers.demand import Demand, LowRankPredictor, Stored


def rounded(matrix: torch.Tensor, bits: Quantize) -> Stored:
    """A float matrix with rows in blocks; in float16 where its columns are no multiple of any block's. Raises
    OverflowError for values past float16."""
    fmt = format_of(bits, matrix.shape[1])
    values = np.ascontiguousarray(matrix.float().numpy())
    raw = quantize(values, fmt, "search") if fmt is not None else values.astype(np.float16).view(np.uint8)
    return Stored(torch.from_numpy(raw), fmt or "F16")


def named(layer: int, a: Stored, b: Stored, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer's predictor as tensors of the file."""
    place = f"layers.{layer}"
    return {f"{place}.a.{a.format}": a.rows, f"{place}.b.{b.format}": b.rows, f"{place}.bias": bias}


def read(tensors: Mapping[str, torch.Tensor], layer: int) -> tuple[Stored, Stored, torch.Tensor]:
    """A, B and bias of a layer from tensors of the file. Raises KeyError where any is missing, OverflowError for values
    past float16."""
    a, b = (_stored(tensors, layer, part) for part in ("a", "b"))
    return a, b, tensors[f"layers.{layer}.bias"].float()


def _stored(tensors: Mapping[str, torch.Tensor], layer: int, part: str) -> Stored:
    name = predictor_tensor(tensors, layer, part)
    fmt = name.partition(f".{part}.")[2]
    if not fmt:
        return rounded(tensors[name], "int8")
    if fmt not in FORMATS or tensors[name].dtype != torch.uint8:
        raise KeyError(name)
    return Stored(tensors[name], fmt)


def load_predictors(file: Path, layers: Iterable[int], kernels: Kernels, device: Device) -> dict[int, Demand]:
    """One for each of `layers`, in the blocks that calibration chose: the quality that it states is that of the rounded
    matrices. Raises BundleError for a file that lacks any."""
    layers = list(layers)
    found: dict[int, Demand] = {}
    if not layers:
        return found
    try:
        with safe_open(file, framework="pt") as tensors:  # its tensors are a mapping of the file: none is to stay
            names = [*tensors.keys()]
            for layer in layers:
                mine = (*(predictor_tensor(names, layer, part) for part in ("a", "b")), f"layers.{layer}.bias")
                a, b, bias = read({name: tensors.get_tensor(name) for name in mine}, layer)
                found[layer] = LowRankPredictor(_kept(a, device), _kept(b, device), device.put(bias.clone()), kernels)
    except (SafetensorError, OSError, OverflowError, KeyError) as error:
        raise BundleError(f"{file} cannot be read: {error}.", "Calibrate the bundle again.") from None
    return found


def _kept(matrix: Stored, device: Device) -> Stored:
    """In memory of its own, as large pages where it is large: a file's mapping would count twice."""
    rows = allocate(matrix.rows.numel())
    rows[:] = matrix.rows.numpy().reshape(-1)
    return Stored(device.put(torch.from_numpy(rows.reshape(len(matrix.rows), -1))), matrix.format)
