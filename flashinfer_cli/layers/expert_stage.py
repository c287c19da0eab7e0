"""The experts of one token on places that do not move: two calls for all that are in memory, wherever they stand.

`expert.apply_experts` computes the same on tensors, and is the plain twin; both give the same bits. What it costs is
not the products but the tensors that it makes of every matrix, hundreds a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..checkpoint.base import FORMATS
from ..kernels import Kernels
from ..kernels.activations import ACTIVATIONS
from ..kernels.native import NumbaKernels
from ..kernels.program import Program
from .expert import GRAIN, VECTORS, ExpertLayout, together


class Stage:
    """Room for the experts of one token, at most `most`, all laid out as `layout` but for where they begin. Layers may
    share one: nothing stays from one to the next."""

    def __init__(self, layout: ExpertLayout, act: str, most: int, kernels: NumbaKernels) -> None:
        self.gate, self.down = layout["gate"], layout["down"]
        self.act = ACTIVATIONS[act]
        self.kernels = kernels
        with torch.inference_mode(False):
            self.x = torch.zeros(1, self.gate.cols)
            self._both = torch.zeros(2 * most, self.gate.rows)
            self.out = torch.zeros(most, self.down.rows)
        self._first, self._second = np.zeros(2 * most, np.int64), np.zeros(most, np.int64)
        self._programs: dict[tuple[int, int], tuple[Program, Program, torch.Tensor, torch.Tensor]] = {}

    def compute(self, at: int, gates: list[int], ups: list[int], downs: list[int]) -> None:
        """What `x` gives in experts whose matrices stand at these addresses goes to `out`, from row `at` on."""
        count = len(downs)
        self._first[: 2 * count] = gates + ups
        self._second[:count] = downs
        into, out, gate, up = self._programs.get((at, count)) or self._write(at, count)
        self.kernels.run(into)
        torch.mul(self.act(gate), up, out=gate)
        self.kernels.run(out)

    def _write(self, at: int, count: int) -> tuple[Program, Program, torch.Tensor, torch.Tensor]:
        into, out = Program(self.kernels.threads), Program(self.kernels.threads)
        both = self._both[: 2 * count]
        for program, x, addresses, part, to in (
            (into, self.x, self._first, self.gate, both),
            (out, both[:count], self._second, self.down, self.out[at : at + count]),
        ):
            elements, size = FORMATS[part.format]
            program.linear_listed(x, addresses, part.rows, part.cols // elements * size, part.format, to)
        self._programs[at, count] = made = into, out, both[:count], both[count:]
        return made


def stage_for(layouts: Sequence[ExpertLayout], act: str, most: int, clamped: bool, kernels: Kernels) -> Stage | None:
    """One for layers whose experts have such layouts; None where `apply_experts` has to do it."""
    gate = layouts[0].get("gate")
    if not isinstance(kernels, NumbaKernels) or gate is None or clamped or not together(layouts):
        return None
    # Where a row ends within one of torch's vectors, its last elements would get other bits than on their own.
    if gate.rows % VECTORS or most * gate.rows > GRAIN:
        return None
    return Stage(layouts[0], act, most, kernels)
