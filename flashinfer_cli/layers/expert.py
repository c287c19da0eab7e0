"""One expert: where its matrices stand in what was read of it, and its product with the tokens that chose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..cache.experts import Pieces
from ..config import MoeConfig
from ..kernels.activations import ACTIVATIONS, clamped_swiglu
from ..kernels.mxfp4 import joined
from ..kernels.reference import to_float
from .linear import Runtime

TURNED_ELEMENTS = 1 << 20  # of a matrix that stands turned, made float32 at a time
VECTORS = 64  # elements, a multiple of what torch's elementwise loops take at a time
GRAIN = 1 << 15  # elements up to which torch does not part such a loop between threads


@dataclass(frozen=True)
class ExpertPart:
    """A matrix [rows, cols] of an expert, or a bias [1, cols]: `nbytes` bytes from `offset` on in one of its pieces.

    `turned`: its columns stand as rows. `scales` is the piece with the scales of MXFP4 that stand apart.
    """

    piece: int
    offset: int
    nbytes: int
    rows: int
    cols: int
    format: str
    turned: bool = False
    scales: int | None = None


# By role: gate (not where act(up) is all), up and down, or gate_up (rows in turn) and down; each may have a bias, as
# "down.bias".
ExpertLayout = Mapping[str, ExpertPart]


def apply_expert(
    x: torch.Tensor, layout: ExpertLayout, pieces: Pieces, act: str, moe: MoeConfig, rt: Runtime
) -> torch.Tensor:
    """x [T, d] through an expert -> [T, d]."""

    def project(x: torch.Tensor, role: str) -> torch.Tensor:
        out, bias = _times(x, layout[role], _stored(role, layout, pieces), rt), layout.get(f"{role}.bias")
        if bias is not None:
            out.add_(rt.kernels.dequantize(_stored(f"{role}.bias", layout, pieces), bias.format, bias.cols))
        return out

    if "gate_up" in layout:
        both = project(x, "gate_up").unflatten(-1, (-1, 2))
        gate, up = both[..., 0].contiguous(), both[..., 1].contiguous()
    elif "gate" in layout:
        gate, up = project(x, "gate"), project(x, "up")
    else:
        return project(rt.apart(ACTIVATIONS[act], project(x, "up")), "down")
    if moe.clamped_swiglu is None:
        h = rt.apart(ACTIVATIONS[act], gate).mul_(up)
    else:
        alpha, limit = moe.clamped_swiglu
        h = rt.apart(lambda g, u: clamped_swiglu(g, u, alpha, limit), gate, up)
    return project(h, "down")


def together(layouts: Sequence[ExpertLayout]) -> bool:
    """May experts of one token be multiplied together: plain gated ones of one shape and format."""
    first = layouts[0]
    if first.keys() != {"gate", "up", "down"} or any(part.turned or part.scales is not None for part in first.values()):
        return False
    shapes = {role: (part.rows, part.cols, part.format) for role, part in first.items()}
    return shapes["gate"] == shapes["up"] and all(
        layout is first or {role: (part.rows, part.cols, part.format) for role, part in layout.items()} == shapes
        for layout in layouts
    )


def apply_experts(
    x: torch.Tensor,
    layouts: Sequence[ExpertLayout],
    pieces: Sequence[Pieces],
    act: str,
    moe: MoeConfig,
    rt: Runtime,
) -> torch.Tensor:
    """x [1, d] through experts that go `together` -> [n, d], of each the bits that `apply_expert` gives it."""
    gate, down = layouts[0]["gate"], layouts[0]["down"]

    def stored(role: str) -> list[torch.Tensor]:
        return [_stored(role, layout, each) for layout, each in zip(layouts, pieces, strict=True)]

    both = x.new_empty(2, len(layouts), gate.rows)
    rt.kernels.linear_listed(x, [*stored("gate"), *stored("up")], gate.format, both.flatten(0, 1))
    alpha = moe.clamped_swiglu

    def activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[act](gate).mul_(up) if alpha is None else clamped_swiglu(gate, up, *alpha)

    # Where a row ends within one of torch's vectors, its last elements would get other bits than on their own.
    whole = gate.rows % VECTORS == 0 and both[0].numel() <= GRAIN
    h = (
        activate(*both)
        if whole
        else torch.cat([activate(g[None].clone(), u[None]) for g, u in zip(*both, strict=True)])
    )
    out = x.new_empty(len(layouts), down.rows)
    rt.kernels.linear_listed(h, stored("down"), down.format, out)
    return out


def _stored(role: str, layout: ExpertLayout, pieces: Pieces) -> torch.Tensor:
    """A part's bytes, uint8 [rows, row bytes]."""
    stored = pieces.views.get(role)
    if stored is not None:
        return stored
    part = layout[role]
    stored = pieces[part.piece][part.offset : part.offset + part.nbytes]
    if part.scales is not None:  # a copy, which would cost memory to keep
        joint = joined(stored.view(part.rows, -1, 16), pieces[part.scales].view(part.rows, -1))
        return joint.view(part.rows, -1)
    pieces.views[role] = stored = stored.view(part.cols if part.turned else part.rows, -1)
    return stored


def _times(x: torch.Tensor, part: ExpertPart, weight: torch.Tensor, rt: Runtime) -> torch.Tensor:
    """x [T, cols] -> [T, rows]."""
    if not part.turned:
        out = x.new_empty(x.shape[0], part.rows)
        rt.kernels.linear(x, weight, part.format, out, 0)
        return out
    out = x.new_zeros(x.shape[0], part.rows)
    step = max(1, TURNED_ELEMENTS // part.rows)
    for first in range(0, part.cols, step):
        rows = to_float(weight[first : first + step], part.format)
        out += rt.apart(partial(_product, rows), x[:, first : first + step])
    return out


def _product(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ rows
