"""The active neurons alone, or all that are in memory: which is computed faster (LLM in a Flash, 2312.11514, 3.3).

    python -m benchmarks.papers flash-resident [--d N] [--d-ff N...] [--formats F16 Q8_G128] [--turns N]

The paper multiplies the whole of its rows in memory, since they stand side by side; here a token's own neurons are
computed where they stand, by a list of addresses. Both are timed in turns on this project's kernels, one call each, one
token and ReLU, over layers that do not fit the caches together. The residents hold the active ones and some times as
many; `side by side` are the active ones alone, which no cache offers. Neurons that do not fire add nothing, so the
residents' sum is that of the active ones and of what fires among the others though no predictor named it (--missed).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch

from flashinfer_cli.bundles.quantize import quantize
from flashinfer_cli.checkpoint.base import FORMATS
from flashinfer_cli.cli.console import Console
from flashinfer_cli.cli.tables import Table
from flashinfer_cli.device import allocate
from flashinfer_cli.kernels import Kernels, select
from flashinfer_cli.kernels.listed import Listed

from .machine import emit

TIMES = (2, 4, 6)  # residents over active
LARGE = 160 << 20  # bytes of active neurons gone through, so that none is still in a cache


@dataclass(frozen=True)
class Slots:
    """A layer's neurons in memory, `records` uint8 [slots, width], and the slots of those that are named, in the order
    of their ids, which is none in the slots."""

    records: np.ndarray
    named: np.ndarray

    @property
    def width(self) -> int:
        return self.records.shape[1]

    def listed(self) -> Listed:
        return Listed(self.records.ctypes.data + self.width * self.named, self.width, (self.records,))


def records_of(fmt: str, x: np.ndarray, fires: np.ndarray, gated: bool, rng: np.random.Generator) -> np.ndarray:
    """uint8 [len(fires), width]: random neurons that for x [d] fire where `fires` says so, and nowhere else."""
    d, elements, size = len(x), *FORMATS[fmt]
    part = d // elements * size
    width = -(-(2 + gated) * part // 512) * 512
    out = np.zeros((len(fires), width), np.uint8)
    for role in range(2 + gated):
        rows = rng.standard_normal((len(fires), d), np.float32) / np.float32(d**0.5)
        if role == 0:
            rows += np.where(fires, 1, -1)[:, None].astype(np.float32) * x * np.float32(8 / (x @ x))
        stored = rows.astype(np.float16).view(np.uint8) if fmt == "F16" else quantize(rows, fmt, "nearest")
        out[:, part * role : part * (role + 1)] = stored
    return out


def active(kernels: Kernels, x: torch.Tensor, fmt: str, gated: bool, out: torch.Tensor, layer: Slots) -> None:
    """out = what the named neurons give."""
    out.zero_()
    kernels.ffn_records(x, layer.listed(), fmt, gated, "relu", None, out)


def resident(
    kernels: Kernels, rows: int, x: torch.Tensor, fmt: str, gated: bool, out: torch.Tensor, layer: Slots
) -> None:
    """out = what the neurons of the first `rows` slots give."""
    out.zero_()
    kernels.ffn_records(x, torch.from_numpy(layer.records[:rows]), fmt, gated, "relu", None, out)


def laid_out(
    fmt: str, gated: bool, d: int, count: int, missed: float, large: int = LARGE
) -> tuple[torch.Tensor, list[Slots], torch.Tensor]:
    """x [1, d], layers with `count` neurons named among TIMES[-1] times as many, and the records of those that fire
    there, the named ones first."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, d), np.float32)
    named, others = np.split(rng.permutation(TIMES[-1] * count), [count])
    fires = np.zeros(TIMES[-1] * count, bool)
    firing = np.concatenate([named, others[: round(missed * count)]])
    fires[firing] = True
    made = records_of(fmt, x[0], fires, gated, rng)
    layers = []
    for _ in range(-(-large // (count * made.shape[1]))):
        memory = allocate(made.nbytes).reshape(made.shape)
        memory[:] = made
        layers.append(Slots(memory, rng.permutation(named)))
    return torch.from_numpy(x), layers, torch.from_numpy(made[firing])


def compared(
    kernels: Kernels, fmt: str, gated: bool, d: int, count: int, missed: float, turns: int, large: int = LARGE
) -> dict[str, Any]:
    """Microseconds a layer, medians over turns; ratios to the active ones, turn by turn; how far the sums are from the
    plain kernels': of the named neurons, and of all that fire in memory."""
    x, layers, firing = laid_out(fmt, gated, d, count, missed, large)
    out = torch.empty(1, d)
    ways: dict[str, Callable[[Slots], None]] = {
        "active": partial(active, kernels, x, fmt, gated, out),
        "once": partial(resident, kernels, count, x, fmt, gated, out),
    }
    for times in TIMES:
        ways[f"{times}x"] = partial(resident, kernels, times * count, x, fmt, gated, out)
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    taken: dict[str, float] = {}
    base = []
    for turn in range(turns + 1):
        for name, work in ways.items():
            begin = time.perf_counter()
            for layer in layers:
                work(layer)
            taken[name] = (time.perf_counter() - begin) / len(layers)
        if turn:  # the first is left out
            base.append(taken["active"])
            for name, seconds in taken.items():
                ratios[name].append(seconds / taken["active"])
    reference, off = select("cpu", "reference")[0], {}
    for name, those in (("active", firing[:count]), (f"{TIMES[-1]}x", firing)):
        truth = torch.zeros(1, d)
        reference.ffn_records(x, those, fmt, gated, "relu", None, truth)
        ways[name](layers[0])
        off[name] = float((out - truth).norm() / truth.norm())
    stored = count * layers[0].width
    return {
        "format": fmt, "gated": gated, "d": d, "active": count, "layers": len(layers), "us": 1e6 * median(base),
        "GB/s": stored / median(base) / 1e9, "over_active": {name: median(each) for name, each in ratios.items()},
        "least": {name: min(each) for name, each in ratios.items()}, "off": off,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--d-ff", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--share", type=float, default=0.045, help="of d_ff that is named")
    parser.add_argument("--missed", type=float, default=0.05, help="of what is named: fires beside it, not named")
    parser.add_argument("--formats", nargs="+", default=["F16", "Q8_G128"], choices=("F16", "Q8_G128", "Q8_0"))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: all cores")
    given = parser.parse_args(arguments)
    kernels, warning = select("cpu", threads=given.threads)
    if warning:
        raise SystemExit(warning)
    rows = []
    for fmt, d_ff, gated in product(given.formats, given.d_ff, (False, True)):
        count = round(given.share * d_ff)
        rows.append({"d_ff": d_ff} | compared(kernels, fmt, gated, given.d, count, given.missed, given.turns))
    cells = [
        (
            f"{row['format']}, {row['d_ff']}{', gated' if row['gated'] else ''}", str(row["active"]),
            f"{row['us']:.0f}", f"{row['GB/s']:.1f}",
            *(f"{row['over_active'][name]:.2f}" for name in ("once", *(f"{times}x" for times in TIMES))),
        )
        for row in rows
    ]  # fmt: skip
    columns = ("neurons", "active", "us", "GB/s", "side by side", *(f"{times}x resident" for times in TIMES))
    notes = (
        f"Times over that of the active ones by their addresses, medians of {given.turns} turns. Sums are within "
        f"{max(max(row['off'].values()) for row in rows):.0e} of the plain kernels', the residents' with what fires "
        f"unnamed ({given.missed:.0%}).",
    )
    Console().show([Table(f"d = {given.d}, {given.share:.1%} of the neurons, one token", columns, cells, notes)])
    emit("flash-resident", rows, share=given.share, missed=given.missed)


if __name__ == "__main__":
    main()
