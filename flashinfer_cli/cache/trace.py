"""Traces: which records every token asked each layer for, as JSON lines, so that policies can be tried without a model.

The first line is the header: what the records are (`kind` "experts" or "neurons"), how many each layer has and of how
many bytes, and under what the trace was made. Every further line is one demand, in the order they came up: the phase,
the layer, a list of ids a token (best first), and where guesses were made the ids guessed for it, best first, by how
many layers ahead; and what each id of the layer was thought to be worth from then on, where anything says so: a router,
a predictor of neurons (bytes in base 64), or what calibration learned. A name that ends in .gz is compressed.
"""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np

from ..errors import UsageError

FORMAT, VERSION = "genai-run trace", 2
READABLE = (1, VERSION)
Kind = Literal["experts", "neurons"]


@dataclass(frozen=True)
class Demand:
    """One pass' demand of one layer. `chosen` int [T, k], -1 for none; `guesses` by layers ahead, int [m] each; `worth`
    int [records]."""

    phase: str
    layer: int
    chosen: np.ndarray
    guesses: Mapping[int, np.ndarray] = field(default_factory=dict)
    worth: np.ndarray | None = None


@dataclass(frozen=True)
class Measured:
    """What a recorded run counted and measured: bytes and seconds of all that it decoded, and rates in bytes a second.

    `plans` are what other budgets would give: bytes of the process, records that have slots, bytes of slices that
    stream a pass; each with no less memory than the one before. None where that cannot be told.
    """

    tokens: int  # that came out
    passes: int
    hits: int
    misses: int
    seconds: float  # without those of writing the trace
    wait_seconds: float
    read_seconds: float  # with a read under way
    other_bytes: int  # read of anything but records: slices, rows of the embedding
    record_rate: float  # of the drive by itself, with requests of the size that records were read by
    other_rate: float
    memory: int  # the budget
    context: int  # tokens
    streamed: int  # bytes of slices a pass, as planned
    plans: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for what no run can have measured."""
        numbers = [getattr(self, each.name) for each in fields(self) if each.name != "plans"]
        for value in (*numbers, *(value for plan in self.plans for value in plan)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise ValueError(value)
        if not min(self.tokens, self.seconds, self.record_rate, self.other_rate) > 0:
            raise ValueError(self.tokens)
        if any(len(plan) != 3 for plan in self.plans) or list(self.plans) != sorted(self.plans, key=lambda p: p[0]):
            raise ValueError(self.plans)


@dataclass(frozen=True)
class Trace:
    """A trace read back. `records` and `record_bytes` by layer."""

    kind: Kind
    records: dict[int, int]
    record_bytes: dict[int, int]
    about: dict[str, Any]  # model, policy, slots, and the like
    demands: list[Demand]
    measured: Measured | None = None

    def tokens(self, phase: str) -> int:
        """Tokens of the passes of a phase."""
        seen = dict.fromkeys(self.records, 0)  # a layer that tokens may skip sees fewer
        for each in self.demands:
            seen[each.layer] += len(each.chosen) * (each.phase == phase)
        return max(seen.values())


class TraceWriter:
    """Writes demands as they come up."""

    def __init__(
        self, out: IO[str], kind: Kind, records: Mapping[int, int], record_bytes: Mapping[int, int], **about: Any
    ) -> None:
        self._out = out
        self.kind, self.record_bytes = kind, dict(record_bytes)
        self._guesses: dict[int, dict[str, list[int]]] = {}
        self._worth: dict[int, list[int] | str] = {}
        self._pending = 0.0
        self.seconds: dict[str, float] = defaultdict(float)  # spent in here, by phase
        header = {"format": FORMAT, "version": VERSION, "kind": kind, "records": dict(records)}
        self._line(header | {"record_bytes": self.record_bytes, "about": about})

    def guess(self, layer: int, ahead: int, ids: list[int]) -> None:
        """The ids guessed for the next demand of a layer, best first, `ahead` layers before it."""
        self._guesses.setdefault(layer, {})[str(ahead)] = ids

    def expect(self, layer: int, worth: np.ndarray) -> None:
        """What each id is thought to be worth from the next demand of a layer on, int [records]; of neurons, of which
        there are thousands, within a byte."""
        start, few = time.perf_counter(), self.kind == "experts"
        self._worth[layer] = worth.tolist() if few else base64.b64encode(worth.astype(np.int8).tobytes()).decode()
        self._pending += time.perf_counter() - start

    def demand(self, phase: str, layer: int, chosen: np.ndarray) -> None:
        """A demand: chosen int [T, k], -1 for none."""
        start, line = time.perf_counter(), dict[str, Any](phase=phase, layer=layer)
        line["ids"] = [[i for i in row if i >= 0] for row in chosen.tolist()]
        extra = {"guesses": self._guesses.pop(layer, None), "worth": self._worth.pop(layer, None)}
        self._line(line | {name: value for name, value in extra.items() if value})
        self.seconds[phase] += self._pending + time.perf_counter() - start
        self._pending = 0.0

    def end(self, measured: Measured) -> None:
        """The run is over, and this is what it measured."""
        self._line({"measured": asdict(measured)})

    def _line(self, value: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(value, separators=(",", ":")) + "\n")


@contextmanager
def open_trace(path: Path) -> Iterator[IO[str]]:
    """A file to write a trace into; UsageError where that cannot be."""
    try:
        out = _open(path, "w")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}.") from None
    with out:
        yield out


def _open(path: Path, mode: Literal["r", "w"]) -> IO[str]:
    kind = gzip.open if path.suffix == ".gz" else open
    return cast(IO[str], kind(path, f"{mode}t", encoding="utf-8"))


def read_trace(path: Path) -> Trace:
    """Read a trace; UsageError, naming the line, where the file is none."""
    hint = "genai-run profile --trace FILE makes one."
    number = 1
    try:
        with _open(path, "r") as lines:
            header = json.loads(next(lines))
            if header["format"] != FORMAT or header["version"] not in READABLE:
                raise ValueError(header["format"])
            demands, measured = [], None
            for number, line in enumerate(lines, 2):  # noqa: B007
                read = json.loads(line)
                if "measured" in read:
                    measured = _measured(read["measured"])
                else:
                    demands.append(_demand(read))
            records = {int(layer): int(count) for layer, count in header["records"].items()}
            sizes = {int(layer): int(count) for layer, count in header["record_bytes"].items()}
            trace = Trace(header["kind"], records, sizes, header["about"], demands, measured)
    except (OSError, UnicodeDecodeError, StopIteration) as error:
        why = "it is empty" if isinstance(error, StopIteration) else getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"'{path}' cannot be read as a trace: {why}.", hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError):
        raise UsageError(f"'{path}' is not a trace: line {number} is not one of this version's.", hint) from None
    for each in demands:
        if each.layer not in records or each.chosen.max(initial=-1) >= records[each.layer]:
            raise UsageError(f"'{path}' names a record of layer {each.layer} that its header does not know.", hint)
        if each.worth is not None and each.worth.shape != (records[each.layer],):
            raise UsageError(f"'{path}' gives worths of layer {each.layer} that are not one for each record.", hint)
    return trace


def _demand(line: Mapping[str, Any]) -> Demand:
    width = max(map(len, line["ids"]), default=0)
    chosen = np.full((len(line["ids"]), max(width, 1)), -1, np.int64)
    for row, ids in enumerate(line["ids"]):
        chosen[row, : len(ids)] = ids
    guesses = {int(ahead): np.asarray(ids, np.int64) for ahead, ids in line.get("guesses", {}).items()}
    worth, said = None, line.get("worth")
    if said is not None:
        worth = np.frombuffer(base64.b64decode(said), np.int8) if isinstance(said, str) else np.asarray(said, np.int64)
    return Demand(str(line["phase"]), int(line["layer"]), chosen, guesses, worth)


def _measured(line: Mapping[str, Any]) -> Measured:
    return Measured(**{**line, "plans": tuple((*plan,) for plan in line["plans"])})
