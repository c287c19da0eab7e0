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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np

from ..errors import UsageError

FORMAT, VERSION = "genai-run trace", 1
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
class Trace:
    """A trace read back. `records` and `record_bytes` by layer."""

    kind: Kind
    records: dict[int, int]
    record_bytes: dict[int, int]
    about: dict[str, Any]  # model, policy, slots, and the like
    demands: list[Demand]

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
        self.kind = kind
        self._guesses: dict[int, dict[str, list[int]]] = {}
        self._worth: dict[int, list[int] | str] = {}
        header = {"format": FORMAT, "version": VERSION, "kind": kind, "records": dict(records)}
        self._line(header | {"record_bytes": dict(record_bytes), "about": about})

    def guess(self, layer: int, ahead: int, ids: list[int]) -> None:
        """The ids guessed for the next demand of a layer, best first, `ahead` layers before it."""
        self._guesses.setdefault(layer, {})[str(ahead)] = ids

    def expect(self, layer: int, worth: np.ndarray) -> None:
        """What each id is thought to be worth from the next demand of a layer on, int [records]; of neurons, of which
        there are thousands, within a byte."""
        few = self.kind == "experts"
        self._worth[layer] = worth.tolist() if few else base64.b64encode(worth.astype(np.int8).tobytes()).decode()

    def demand(self, phase: str, layer: int, chosen: np.ndarray) -> None:
        """A demand: chosen int [T, k], -1 for none."""
        line: dict[str, Any] = {"phase": phase, "layer": layer}
        line["ids"] = [[i for i in row if i >= 0] for row in chosen.tolist()]
        extra = {"guesses": self._guesses.pop(layer, None), "worth": self._worth.pop(layer, None)}
        self._line(line | {name: value for name, value in extra.items() if value})

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
            if header["format"] != FORMAT or header["version"] != VERSION:
                raise ValueError(header["format"])
            demands = []
            for number, line in enumerate(lines, 2):  # noqa: B007
                demands.append(_demand(json.loads(line)))
            records = {int(layer): int(count) for layer, count in header["records"].items()}
            sizes = {int(layer): int(count) for layer, count in header["record_bytes"].items()}
            trace = Trace(header["kind"], records, sizes, header["about"], demands)
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
