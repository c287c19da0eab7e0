"""The kernels in plain torch, on any device: what the right answer is, and what runs where nothing faster does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ..checkpoint.base import FORMATS, PLAIN
from .activations import ACTIVATIONS
from .kept import to_floats
from .listed import Listed

LANES = 16  # 32-bit words of our blocks of four bits
TILE_BYTES = 1 << 20  # of float32, converted at a time
APART = 32  # up to so many tokens are multiplied one by one: the same bits for each, whatever stands beside it
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_plain(weight: torch.Tensor, fmt: str) -> torch.Tensor:
    """uint8 [..., bytes] in a plain format as a tensor of its dtype; copied only when torch cannot view that
    address."""
    dtype = DTYPES[fmt]
    size = FORMATS[fmt][1]
    if weight.storage_offset() % size or weight.data_ptr() % size:
        weight = weight.clone()
    return weight.view(dtype)


def to_float(weight: torch.Tensor, fmt: str) -> torch.Tensor:
    """uint8 [rows, row bytes] as float32 [rows, cols], on the same device."""
    if fmt in PLAIN:
        return as_plain(weight, fmt).float()
    if fmt == "Q4_G64":
        return _q4_g64(weight)
    if fmt == "Q8_G128":
        return _q8_g128(weight)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(weight.cpu().numpy(), GGMLQuantizationType[fmt])
    return torch.from_numpy(values).to(weight.device)


def _q8_g128(weight: torch.Tensor) -> torch.Tensor:
    """Our own int8 blocks: a float16 times eight bits is exact in float32."""
    blocks = weight.contiguous().view(len(weight), -1, FORMATS["Q8_G128"][1])
    scale = blocks[..., :2].clone().view(torch.float16).float()
    return (blocks[..., 2:].contiguous().view(torch.int8).float() * scale).view(len(weight), -1)


def _q4_g64(weight: torch.Tensor) -> torch.Tensor:
    """Our own int4 blocks (`checkpoint.base.FORMATS`), rounded once: products of float16 and four bits are exact in
    float64, and so is the sum of one with a float16."""
    blocks = weight.contiguous().view(len(weight), -1, FORMATS["Q4_G64"][1]).clone()
    scale, least = blocks[..., :8].contiguous().view(torch.float16).double().view(*blocks.shape[:2], 2, 2, 1).unbind(3)
    words = blocks[..., 8:].view(*blocks.shape[:2], 1, LANES, 4)
    q = torch.stack((words & 15, words >> 4), -1).flatten(-2).transpose(-1, -2)  # [rows, blocks, 1, 8, 16]
    return (q.reshape(*blocks.shape[:2], 2, 64) * scale + least).float().view(len(weight), -1)


def _tiles(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, TILE_BYTES // (4 * cols))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, cols] @ weight [cols, rows]; torch rounds products of several rows in another way than of one."""
    if not 1 < len(x) <= APART:
        return x @ weight
    return torch.cat([x[t : t + 1].clone() @ weight for t in range(len(x))])


class ReferenceKernels:
    """`Kernels` in plain torch; scratch is about TILE_BYTES, however large the weights."""

    name = "reference"
    own_threads = False

    def keep_cores(self, keep: bool) -> None:
        """It has no threads of its own."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, fmt: str, out: torch.Tensor, start: int) -> None:
        for tile in _tiles(weight.shape[0], x.shape[1]):
            out[:, start + tile.start : start + tile.stop] = _times(x, to_float(weight[tile], fmt).T)

    def linear_listed(self, x: torch.Tensor, weights: Sequence[torch.Tensor], fmt: str, out: torch.Tensor) -> None:
        for index, weight in enumerate(weights):
            row = index if len(x) > 1 else 0
            self.linear(x[row : row + 1], weight, fmt, out[index : index + 1], 0)

    def ffn_records(
        self,
        x: torch.Tensor,
        records: torch.Tensor | Listed,
        fmt: str,
        gated: bool,
        act: str,
        bias: tuple[torch.Tensor | None, torch.Tensor | None] | None,
        out: torch.Tensor,
    ) -> None:
        if isinstance(records, Listed):
            records = records.gather().to(x.device)
        if 1 < len(x) <= APART:
            for t in range(len(x)):
                self.ffn_records(x[t : t + 1].clone(), records, fmt, gated, act, bias, out[t : t + 1])
            return
        part = x.shape[1] // FORMATS[fmt][0] * FORMATS[fmt][1]
        gate_bias, up_bias = bias or (None, None)
        rows = records

        def project(tile: slice, index: int, own: torch.Tensor | None) -> torch.Tensor:
            y = x @ to_float(rows[tile, index * part : (index + 1) * part].contiguous(), fmt).T
            return y if own is None else y + own[tile]

        for tile in _tiles(records.shape[0], x.shape[1]):
            up = project(tile, int(gated), up_bias)
            hidden = ACTIVATIONS[act](project(tile, 0, gate_bias)) * up if gated else ACTIVATIONS[act](up)
            down = (1 + gated) * part
            out += hidden @ to_float(records[tile, down : down + part].contiguous(), fmt)

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        out.copy_(y if weight is None else y * weight)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out: torch.Tensor
    ) -> None:
        out.copy_(F.layer_norm(x, x.shape[-1:], weight, bias, eps))

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        low = max(0, keys.shape[1] - window) if window else 0
        seen, found = to_floats(keys[:, low:]), to_floats(values[:, low:])
        scores = torch.matmul(q.view(len(keys), -1, q.shape[1]), seen.transpose(1, 2)).mul_(scale)
        out.copy_(torch.matmul(scores.softmax(-1), found).view_as(q))

    def dequantize(self, weight: torch.Tensor, fmt: str, cols: int) -> torch.Tensor:
        assert weight.shape[1] == cols // FORMATS[fmt][0] * FORMATS[fmt][1], (weight.shape, fmt, cols)
        return to_float(weight, fmt).clone() if fmt == "F32" else to_float(weight, fmt)
