"""Weights in every stored format at unaligned addresses, and the float32 values they stand for."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

from flashinfer_cli.checkpoint.base import FORMATS, PLAIN

SCALES = {  # byte offsets of the float16 fields of a block
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q4_G64": (0, 2, 4, 6), "Q8_G128": (0,), "MXFP4": (),
}  # fmt: skip


def unaligned(data: np.ndarray, element: int) -> torch.Tensor:
    """The bytes as a uint8 tensor whose address is a multiple of the element size and of nothing larger."""
    buffer = torch.empty(data.size + 128, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + element
    view = buffer[start : start + data.size].view(data.shape)
    view.copy_(torch.from_numpy(data))
    assert view.data_ptr() % 64 == element
    return view


def weights(fmt: str, rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Stored bytes, unaligned, and the float32 values that they stand for."""
    rng = np.random.default_rng(seed)
    if fmt in PLAIN:
        values = torch.from_numpy(rng.standard_normal((rows, cols), np.float32))
        stored = values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[fmt])
        return unaligned(stored.view(torch.uint8).numpy(), FORMATS[fmt][1]), stored.float().numpy()
    elements, size = FORMATS[fmt]
    blocks = rng.integers(0, 256, (rows * cols // elements, size), np.uint8)
    for offset in SCALES[fmt]:
        scale = rng.uniform(-0.02, 0.02, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scale[:, None].view(np.uint8)
    if fmt == "MXFP4":  # powers of two, one of them among the least there are
        blocks[:, 0] = rng.integers(112, 122, len(blocks))
        blocks[:2, 0] = 0, 1
    data = blocks.reshape(rows, -1)
    if fmt in OURS:
        return unaligned(data, 2), OURS[fmt](blocks).reshape(rows, cols)
    return unaligned(data, 2), gguf_dequantize(data, GGMLQuantizationType[fmt])


def g64_values(blocks: np.ndarray) -> np.ndarray:
    """Our own int4 blocks [n, 72], element by element, as checkpoint.base has their bytes."""
    out = np.empty((len(blocks), 128), np.float32)
    for block, row in zip(blocks, out, strict=True):
        fields, words = block[:8].view(np.float16).astype(np.float64), block[8:].view(np.uint32)
        for element in range(128):
            q = int(words[element % 16]) >> (4 * (element // 16)) & 15
            row[element] = fields[2 * (element // 64)] * q + fields[2 * (element // 64) + 1]
    return out


def g128_values(blocks: np.ndarray) -> np.ndarray:
    """Our own int8 blocks [n, 130], element by element."""
    out = np.empty((len(blocks), 128), np.float32)
    for block, row in zip(blocks, out, strict=True):
        for element in range(128):
            row[element] = float(block[:2].view(np.float16)[0]) * int(block[2 + element : 3 + element].view(np.int8)[0])
    return out


OURS = {"Q4_G64": g64_values, "Q8_G128": g128_values}


def cols_of(fmt: str) -> int:
    return 331 if fmt in PLAIN else 3 * FORMATS[fmt][0]


def close(got: torch.Tensor, want: np.ndarray, magnitude: np.ndarray) -> None:
    """Within a few float32 roundings of the sum of absolute terms."""
    assert np.all(np.abs(got.numpy() - want) <= 2e-6 * magnitude + 1e-30), np.abs(got.numpy() - want).max()
