"""Keys and values as a cache keeps them: float32, float16, or GGUF's Q8_0, a float16 scale for every 32 elements.

Which one a tensor is in shows in its dtype, uint8 being blocks. `tokens.keep` is the compiled twin, bit for bit.
"""

from __future__ import annotations

import torch

from ..checkpoint.base import FORMATS
from ..config import KvCacheType, ModelConfig
from ..errors import UsageError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "Q8_0": torch.uint8}
LARGEST_HALF = 65504.0  # what is larger is kept as this


def kept_format_of(config: ModelConfig, asked: KvCacheType) -> str:
    """The format for a model, `asked` being settled; states of a recurrent one are never rounded. Raises UsageError
    where heads are of no multiple of a block's elements."""
    fmt = "F32" if config.recurrent else asked.upper()
    block = FORMATS[fmt][0]
    for width in config.kv_shape[1:]:
        if width % block:
            raise UsageError(
                f"--kv-cache-type {asked} keeps blocks of {block} elements, and this model's heads have {width}.",
                "Take f16.",
            )
    return fmt


def kept_format(kept: torch.Tensor) -> str:
    return next(fmt for fmt, dtype in DTYPES.items() if dtype == kept.dtype)


def kept_width(fmt: str, elements: int) -> int:
    """The last dimension of what keeps so many elements."""
    block, size = FORMATS[fmt]
    assert elements % block == 0, (fmt, elements)
    return elements // block * size if block > 1 else elements


def kept_nbytes(config: ModelConfig, fmt: str) -> int:
    """Bytes of keys and values that one token adds over all layers."""
    block, size = FORMATS[fmt]
    heads, *widths = config.kv_shape
    return config.num_hidden_layers * heads * sum(width // block * size for width in widths)


def elements(kept: torch.Tensor) -> int:
    """How many the last dimension keeps."""
    return kept.shape[-1] if kept.dtype != torch.uint8 else kept.shape[-1] // FORMATS["Q8_0"][1] * FORMATS["Q8_0"][0]


def keep(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """float32 [..., n] as it is kept."""
    if fmt == "F32":
        return x
    if fmt == "F16":
        return x.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    groups = x.reshape(*x.shape[:-1], -1, FORMATS[fmt][0])
    scale = (groups.abs().amax(-1, keepdim=True) / 127.0).clamp(max=LARGEST_HALF).half()
    rounded = scale.float()
    inverse = torch.where(rounded == 0, 0.0, 1.0 / rounded)
    q = (groups * inverse).round().clamp(-127, 127).nan_to_num().to(torch.int8)
    return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), -1).flatten(-2)


def to_floats(kept: torch.Tensor) -> torch.Tensor:
    """Any of them, of any strides, as float32 [..., n]; float32 itself is not copied."""
    if kept.dtype != torch.uint8:
        return kept.float()
    blocks = kept.reshape(*kept.shape[:-1], -1, FORMATS["Q8_0"][1])
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].contiguous().view(torch.int8).float() * scale).flatten(-2)
