"""MXFP4 (OCP Microscaling 1.0): 32 values of 4 bits, e2m1, and one power of two that scales them.

Safetensors of gpt_oss keep the pairs of values apart from the scales, values 2j and 2j + 1 in a byte. GGUF has one
block of 17 bytes, the scale first, values j and 16 + j in a byte; that is the format we compute on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def join(pairs: Any, scales: Any, out: Any) -> None:
    """out [..., 17] = the block of pairs [..., 16] and scales [...]: uint8, torch's or numpy's."""
    low, high = pairs[..., :8], pairs[..., 8:]
    out[..., 0] = scales
    out[..., 1::2] = (low & 15) | (high << 4)
    out[..., 2::2] = (low >> 4) | (high & 240)


def joined(pairs: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, groups, 16] and [rows, groups] -> blocks, uint8 [rows, 17 * groups]."""
    out = pairs.new_empty(*scales.shape, 17)
    join(pairs, scales, out)
    return out.flatten(1)
