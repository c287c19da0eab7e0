"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels import Kernels


@dataclass(frozen=True)
class Norm:
    """y = normalised(x) * (weight + offset) + bias over the last dimension. `weight` has the offset added already."""

    kind: str  # "rms" | "layer"
    weight: torch.Tensor | None  # float32 [d]
    bias: torch.Tensor | None
    eps: float
    kernels: Kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        x = x.contiguous()
        out = torch.empty_like(x)
        self.kernels.norm(x, self.weight, self.eps, out)
        return out
