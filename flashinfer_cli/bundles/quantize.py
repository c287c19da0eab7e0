"""Rounding weights to int8 and int4 blocks: to nearest, or with a search for the scales that lose least. numpy only.

int8 is Q8_G128 (`checkpoint.base.FORMATS`), groups of 128 with a float16 scale, symmetric, 8.125 bits a weight; int4 is
Q4_G64, groups of 64 with a float16 scale and least value, 4.5 bits. Where columns are no multiple of 128 they are
GGUF's Q8_0 and Q4_1, groups of 32 at 8.5 and 5 bits. The search does what k-means does in one dimension, with levels
that stay equally spaced: round to the levels, fit scale and least value to what was rounded by least squares, round
again; from several widths of the range, since a few large weights are often better cut off, and with many levels a
slightly other scale often fits better. What is kept is the best of all, judged with the scales as float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..checkpoint.base import FORMATS
from ..errors import UsageError

Floats = npt.NDArray[np.float32]
Rounding = Literal["search", "nearest"]
Quantize = Literal["none", "int8", "int4"]

QUANTIZE: tuple[Quantize, ...] = ("none", "int8", "int4")
ROUNDINGS: tuple[Rounding, ...] = ("search", "nearest")
TRUNK_OF: dict[Quantize, Quantize] = {"none": "none", "int8": "int8", "int4": "int8"}  # unless it is said otherwise
CANDIDATES = {"int8": ("Q8_G128", "Q8_0"), "int4": ("Q4_G64", "Q4_1")}
WIDTHS = {  # shares of the range to begin from; those of the symmetric formats are of the largest magnitude
    "Q8_0": (1.0, 0.99), "Q8_G128": (1.0, 0.99, 1.01), "Q4_1": (1.0, 0.9, 0.8), "Q4_G64": (1.0, 0.9, 0.8),
}  # fmt: skip
SYMMETRIC = ("Q8_0", "Q8_G128")
REFITS = 3
CHUNK = 1 << 15  # elements worked on at a time: the temporaries stay in the second-level cache
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Quantization:
    """What is rounded when a bundle is made: `experts` is what streams (experts, neurons of dense layers), `trunk`
    attention, embedding, head and shared experts. `small` is what second, smaller records of the experts hold, for
    `--degrade`. Raises UsageError for words that there are not, or small copies that are not smaller."""

    experts: Quantize = "none"
    trunk: Quantize = "none"
    rounding: Rounding = "search"
    small: Quantize = "none"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--quantize-experts", self.experts, QUANTIZE),
            ("--quantize-trunk", self.trunk, QUANTIZE),
            ("--small-experts", self.small, QUANTIZE),
            ("--rounding", self.rounding, ROUNDINGS),
        ):
            if value not in known:
                raise UsageError(f"{name} is '{value}', which is none of {', '.join(known)}.")
        if self.small != "none" and QUANTIZE.index(self.small) <= QUANTIZE.index(self.experts):
            raise UsageError(
                f"--small-experts {self.small} is no smaller than experts of {self.experts}.", "Ask for fewer bits."
            )

    @property
    def parameters(self) -> dict[str, str]:
        """What the manifest says about it."""
        found: dict[str, str] = {
            "quantize_experts": self.experts,
            "quantize_trunk": self.trunk,
            "rounding": self.rounding,
        }
        return found if self.small == "none" else found | {"small_experts": self.small}


def chosen(
    quantize: str = "none",
    experts: str | None = None,
    trunk: str | None = None,
    rounding: str = "search",
    small: str | None = None,
) -> Quantization:
    """The choice from options: `experts` and `trunk` are what `quantize` says where they are not given.

    Raises UsageError for words that there are not.
    """
    if quantize not in QUANTIZE:
        raise UsageError(f"--quantize is '{quantize}', which is none of {', '.join(QUANTIZE)}.")
    default = TRUNK_OF[quantize]
    return Quantization(experts or quantize, trunk or default, rounding, small or "none")  # type: ignore[arg-type]


def format_of(quantize: Quantize, cols: int) -> str | None:
    """The format for rows of `cols` elements; None where none fits: `none`, or columns not a multiple of 32."""
    return next((f for f in CANDIDATES.get(quantize, ()) if cols % FORMATS[f][0] == 0), None)


def quantize(values: Floats, format: str, rounding: Rounding) -> npt.NDArray[np.uint8]:
    """Finite float32 [rows, cols] as blocks, uint8 [rows, row bytes].

    Each group is rounded by itself: its bytes depend on nothing else. Raises OverflowError for weights that float16
    scales cannot reach.
    """
    block, size = FORMATS[format]
    rows, cols = values.shape
    assert cols % block == 0, (values.shape, format)
    flat = np.ascontiguousarray(values).reshape(-1, block)
    out = np.empty((len(flat), size), np.uint8)
    step = max(1, CHUNK // block)
    for first in range(0, len(flat), step):
        _ENCODERS[format](flat[first : first + step], out[first : first + step], rounding)
    return out.reshape(rows, cols // block * size)


def _scaled_bytes(format: str, values: Floats, out: npt.NDArray[np.uint8], rounding: Rounding) -> None:
    scale, _, q = _round(values, format, rounding)
    out[:, :2] = _half_bytes(scale)
    out[:, 2:] = q.T.astype(np.int8).view(np.uint8)


def _q4_1(values: Floats, out: npt.NDArray[np.uint8], rounding: Rounding) -> None:
    scale, least, q = _round(values, "Q4_1", rounding)
    out[:, :2], out[:, 2:4] = _half_bytes(scale), _half_bytes(least)
    levels = q.T.astype(np.uint8)
    out[:, 4:] = levels[:, :16] | levels[:, 16:] << 4


def _q4_g64(values: Floats, out: npt.NDArray[np.uint8], rounding: Rounding) -> None:
    scale, least, q = _round(values.reshape(-1, 64), "Q4_G64", rounding)
    for group in range(2):
        out[:, 4 * group : 4 * group + 2] = _half_bytes(scale[group::2])
        out[:, 4 * group + 2 : 4 * group + 4] = _half_bytes(least[group::2])
    levels = q.T.astype(np.uint32).reshape(-1, 8, 16)
    words = np.zeros((len(levels), 16), "<u4")
    for vector in range(8):
        words |= levels[:, vector] << np.uint32(4 * vector)
    out[:, 8:] = words.view(np.uint8)


_ENCODERS: dict[str, Callable[[Floats, npt.NDArray[np.uint8], Rounding], None]] = {
    "Q8_0": partial(_scaled_bytes, "Q8_0"),
    "Q8_G128": partial(_scaled_bytes, "Q8_G128"),
    "Q4_1": _q4_1,
    "Q4_G64": _q4_g64,
}


# ------------------------------------------------------------------ scales


def _half_bytes(values: Floats) -> npt.NDArray[np.uint8]:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _half(values: Floats) -> Floats:
    """Rounded to float16."""
    if values.size and float(np.abs(values).max()) > LARGEST:
        raise OverflowError("a weight is too large for float16 scales")
    return values.astype(np.float16).astype(np.float32)


def _total(values: Floats) -> Floats:
    """Sums over the first axis, whose length is a power of two: halves first, in one order whatever stands beside."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def _levels(x: Floats, scale: Floats, least: Floats | None, low: int, high: int) -> Floats:
    """The nearest of low .. high for each element; 0 where all of a group are one value."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    q = x * inverse if least is None else (x - least) * inverse
    return np.clip(np.rint(q, out=q), low, high, out=q)


def _round(values: Floats, format: str, rounding: Rounding) -> tuple[Floats, Floats, Floats]:
    """Groups [G, n] -> scales [G], least values [G] (zeros where symmetric), levels [n, G]."""
    x = np.ascontiguousarray(values.T)
    symmetric = format in SYMMETRIC
    low, high = (-127, 127) if symmetric else (0, 15)
    best: tuple[Floats, Floats | None, Floats] | None = None
    loss = q = np.empty(0, np.float32)
    for scale, least in _starts(x, format, symmetric, rounding):
        for refit in range(REFITS + 1 if rounding == "search" else 1):
            if refit:
                scale, least = _fitted(x, q, least)
            scale = _half(scale)
            least = None if least is None else _half(least)
            q = _levels(x, scale, least, low, high)
            if rounding == "nearest":
                return scale, np.zeros_like(scale) if least is None else least, q
            error = q * scale - x if least is None else q * scale + least - x
            lost = _total(error * error)
            if best is None:
                best, loss = (scale, least, q), lost
                continue
            better = lost < loss
            loss = np.where(better, lost, loss)
            best = (
                np.where(better, scale, best[0]),
                None if least is None or best[1] is None else np.where(better, least, best[1]),
                np.where(better, q, best[2]),
            )
    assert best is not None
    return best[0], np.zeros_like(best[0]) if best[1] is None else best[1], best[2]


def _starts(x: Floats, format: str, symmetric: bool, rounding: Rounding) -> Iterator[tuple[Floats, Floats | None]]:
    """Scales and least values to begin from, those that cover the whole range first."""
    top, bottom = x.max(0), x.min(0)
    for width in WIDTHS[format] if rounding == "search" else (1.0,):
        share = np.float32(width)
        if symmetric:
            yield np.maximum(top, -bottom) * (share / np.float32(127)), None
        else:
            span = top * np.float32(0.5) - bottom * np.float32(0.5)  # half of it: the whole may be past float32
            yield span * (share / np.float32(7.5)), bottom + span * (1 - share)


def _fitted(x: Floats, q: Floats, least: Floats | None) -> tuple[Floats, Floats | None]:
    """Scale and least value that bring the levels q closest to x: least squares."""
    if least is None:
        squares = _total(q * q)
        return np.divide(_total(q * x), squares, out=np.zeros_like(squares), where=squares > 0), None
    n = np.float32(1 / len(x))
    mean_x, mean_q = _total(x) * n, _total(q) * n
    away = q - mean_q
    squares = _total(away * away)
    scale: Any = np.divide(_total(away * x), squares, out=np.zeros_like(squares), where=squares > 0)
    return scale, mean_x - scale * mean_q
