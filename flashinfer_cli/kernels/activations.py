"""The activation functions of an FFN, by the names of ModelConfig.hidden_act."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]


def relu2(x: torch.Tensor) -> torch.Tensor:
    """ReLU squared (2109.08668)."""
    return F.relu(x).square()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (1606.08415): `gelu_new` and `gelu_pytorch_tanh` in a config.json."""
    return F.gelu(x, approximate="tanh")


def gelu_quick(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), the coarser approximation of GELU (1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gate * sigmoid(alpha gate) * (up + 1) with gate at most, and up within, `limit`: gpt_oss' gated activation."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_quick": gelu_quick,
}
