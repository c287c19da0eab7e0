"""Where a window of neurons should end when drafts are checked (2312.11514): the paper's rule and others, replayed.

The neurons that fire are recorded, token by token, while stories-relu checks runs of stories-draft. A run of lambda
drafted tokens is read for at once; what is kept behind it is the union over the last k tokens that count. The paper
lets the window end at token alpha (lambda + 1), since what stands is not known while layers are still to come.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import flashinfer_cli as fc
from flashinfer_cli.config import SamplingParams
from flashinfer_cli.layers.ffn import DenseFfn

from .speculative_zoo import CONTEXT, prompts

Pass = tuple[list[np.ndarray], int]  # bool [rows, neurons] of each layer, tokens that stood (the last included)
DRAFTED = 4


def record(tokens: int, number: int) -> tuple[list[Pass], float]:
    """Passes of checking, and the acceptance of their drafts."""
    rows: list[np.ndarray] = []
    passes: list[Pass] = []
    options = {"context": CONTEXT, "kernels": "reference", "draft": "zoo:stories-draft", "speculate": str(DRAFTED)}
    with fc.load("zoo:stories-relu", **options) as engine:
        speculator = engine.speculator
        assert speculator is not None
        plain, target = DenseFfn.__call__, engine.decoder

        def watched(self: DenseFfn, x: torch.Tensor, rt: Any) -> torch.Tensor:
            if rt is target.rt and rt.mode.decoding:
                gate = self.gate if self.gate is not None else self.up
                rows.append((gate(x, rt) > 0).numpy())
            return plain(self, x, rt)

        noted = speculator.note

        def note(drafted: int, accepted: int, *seconds: float) -> None:
            passes.append((rows.copy(), accepted + 1))
            rows.clear()
            noted(drafted, accepted, *seconds)

        DenseFfn.__call__ = watched  # type: ignore[method-assign]
        speculator.note = note  # type: ignore[method-assign]
        try:
            for prompt in prompts(engine, number):
                list(engine.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)))
        finally:
            DenseFfn.__call__ = plain  # type: ignore[method-assign]
        alpha = float(speculator.report()["alpha"])  # type: ignore[arg-type]
    return passes, alpha


def counted(rule: str, rows: int, stood: int, alpha: float) -> int:
    """How many tokens of a pass belong to the window behind it."""
    if rule == "all":
        return rows
    if rule == "stood":
        return min(stood, rows)
    if rule == "first":
        return 1
    return max(1, min(rows, round(alpha * rows)))


def replayed(passes: list[Pass], rule: str, k: int, alpha: float) -> tuple[float, float]:
    """(neurons read a token that stood, share that is resident) of all layers."""
    read, held_sum, layers = 0, 0.0, len(passes[0][0])
    stood_sum = sum(stood for _, stood in passes)
    for layer in range(layers):
        recent: list[np.ndarray] = []
        held = np.zeros(passes[0][0][layer].shape[1], bool)
        for rows, stood in passes:
            fired = rows[layer]
            read += int((fired.any(0) & ~held).sum())
            recent = [*recent, *fired[: counted(rule, len(fired), stood, alpha)]][-k:]
            held = np.any(recent, axis=0)
            held_sum += held.mean()
    return read / stood_sum, held_sum / layers / len(passes)


def plain(passes: list[Pass], k: int) -> tuple[float, float]:
    """The same without drafts: a token a pass."""
    singles: list[Pass] = [
        ([fired[row : row + 1] for fired in rows], 1)
        for rows, stood in passes
        for row in range(min(stood, len(rows[0])))
    ]  # fmt: skip
    return replayed(singles, "all", k, 1.0)


def run(tokens: int, number: int | None) -> list[dict[str, Any]]:
    passes, alpha = record(tokens, number or 16)
    print(f"{len(passes)} passes of {DRAFTED} drafted, alpha {alpha:.2f}; neurons read a token, share resident")
    print(f"{'k':>3} {'plain':>15}" + "".join(f"{rule:>15}" for rule in ("paper", "stood", "all", "first")))
    found = []
    for k in (2, 4, 6, 10):
        row: dict[str, Any] = {"case": "window", "k": k, "alpha": alpha, "drafted": DRAFTED, "cap": None}
        row["plain"] = plain(passes, k)
        row |= {rule: replayed(passes, rule, k, alpha) for rule in ("paper", "stood", "all", "first")}
        cells = (
            f"{read:>8.0f} {held:>5.1%}" for read, held in (row[n] for n in ("plain", "paper", "stood", "all", "first"))
        )
        print(f"{k:>3} " + " ".join(f"{cell:>14}" for cell in cells), flush=True)
        found.append(row)
    return found
