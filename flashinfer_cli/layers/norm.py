"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import Kernels
from ..kernels.program import Program


@dataclass(frozen=True)
class Norm:
    """y = normalised(x) * (weight + offset) + bias over the last dimension. `weight` has the offset added already."""

    kind: str  # "rms" | "layer"
    weight: torch.Tensor | None  # float32 [d]
    bias: torch.Tensor | None
    eps: float
    kernels: Kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        if self.kind == "layer":
            self.kernels.layer_norm(x, self.weight, self.bias, self.eps, out)
        else:
            self.kernels.norm(x, self.weight, self.eps, out)
        return out

    def write(self, program: Program, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add to a program: out = this of x."""
        if self.kind == "layer":
            program.layer_norm(x, self.weight, self.bias, self.eps, out)
        else:
            program.norm(x, self.weight, self.eps, out)
