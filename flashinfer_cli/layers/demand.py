"""Which neurons a token needs, said before any of them is read: the demands of LLM in a Flash (2312.11514)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..checkpoint.base import FORMATS
from ..kernels import Kernels
from ..kernels.activations import ACTIVATIONS
from ..kernels.reference import ReferenceKernels


class Named(NamedTuple):
    """The neurons to compute, int64, ascending; and where there are scores, those of all neurons, float32 [d_ff], of
    which the ones above zero are named."""

    ids: np.ndarray
    scores: np.ndarray | None


class Demand(Protocol):
    """Input of an FFN -> the neurons to compute."""

    def __call__(self, x: torch.Tensor) -> Named:
        """x float32 [1, d], normed as the FFN sees it."""
        ...


class Stored(NamedTuple):
    """A matrix as kernels take it: uint8 [rows, row bytes] in a format."""

    rows: torch.Tensor
    format: str

    @property
    def cols(self) -> int:
        elements, size = FORMATS[self.format]
        return self.rows.shape[1] // size * elements

    def values(self) -> torch.Tensor:
        """float32 [rows, cols], as products see it."""
        return ReferenceKernels().dequantize(self.rows, self.format, self.cols)


@dataclass(frozen=True)
class LowRankPredictor:
    """sigmoid(B A x + bias) > 1/2: d -> r -> d_ff (2312.11514, 3.1), trained on which neurons fired.

    The threshold that calibration chose is in the bias.
    """

    a: Stored  # [r, d]
    b: Stored  # [d_ff, r]
    bias: torch.Tensor  # float32 [d_ff]
    kernels: Kernels

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, d] -> logits [T, d_ff]; above zero is predicted to fire."""
        low, out = x.new_empty(len(x), len(self.a.rows)), x.new_empty(len(x), len(self.b.rows))
        self.kernels.linear(x, self.a.rows, self.a.format, low, 0)
        self.kernels.linear(low, self.b.rows, self.b.format, out, 0)
        return out.add_(self.bias)

    def __call__(self, x: torch.Tensor) -> Named:
        scores = self.scores(x)[0]
        return Named((scores > 0).nonzero()[:, 0].cpu().numpy(), scores.cpu().numpy())


@dataclass(frozen=True)
class Oracle:
    """The neurons that fire, from the gate itself: what a perfect predictor would say. Needs all of it; for tests."""

    gate: torch.Tensor  # float32 [d_ff, d]: the up projection where there is no gate
    bias: torch.Tensor | None
    act: str

    def __call__(self, x: torch.Tensor) -> Named:
        fired = ACTIVATIONS[self.act](F.linear(x, self.gate, self.bias))[0] != 0
        return Named(fired.nonzero()[:, 0].cpu().numpy(), None)
