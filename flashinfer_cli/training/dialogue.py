"""Instruction rows to token rows: read from JSONL, split, and batched with targets on the answers only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from .data import HELD_OUT
from .objective import IGNORED as IGNORED

ALIKE = 32  # batches whose rows are sorted by length among each other
TEMPLATE = (  # for models that have none; its answers end with the model's end of text
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}### Instruction:\n{{ message['content'] }}\n### Answer:\n{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Row:
    """What is asked and what is answered."""

    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """Token ids of one row; the answer, its stop token included, starts at `start`."""

    ids: tuple[int, ...]
    start: int


def read_rows(path: Path) -> list[Row]:
    """Rows {"instruction": ..., "input": ... (may be missing), "output": ...} of a JSONL file, blank lines skipped.

    Raises UsageError naming the first line that is not one.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    rows = [_row(line, f"Line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    if len(rows) < 2:
        raise UsageError(f"{path} has {len(rows)} rows, too few to hold one out.")
    return rows


def _row(line: bytes, where: str) -> Row:
    hint = 'Each line is an object like {"instruction": "...", "input": "...", "output": "..."}.'
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # bad UTF-8 is a ValueError too
        raise UsageError(f"{where} is not JSON.", hint) from None
    if not isinstance(found, dict):
        raise UsageError(f"{where} is not an object.", hint)
    parts = [found.get("instruction"), found.get("input") or "", found.get("output")]
    for key, value in zip(("instruction", "input", "output"), parts, strict=True):
        if not isinstance(value, str) or (key != "input" and not value.strip()):
            raise UsageError(f"{where} has no text under '{key}'.", hint)
    instruction, given, output = (str(part).strip() for part in parts)
    return Row(f"{instruction}\n{given}" if given else instruction, output)


def split_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(to train on, held out): one in 32 by a hash of the question, so that its copies fall on the same side."""
    train: list[Row] = []
    held: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(row.question.encode()).digest()
        (held if int.from_bytes(digest[:4]) % HELD_OUT == 0 else train).append(row)
    if not held:
        held.append(train.pop())
    if not train:
        train.append(held.pop())
    if not train or not held:
        raise UsageError("All rows ask the same, so none can be held out.")
    return train, held


def examples(
    rows: Sequence[Row], prompt: Callable[[str], list[int]], answer: Callable[[str], list[int]], stop: int, longest: int
) -> list[Example]:
    """Rows as token ids; those of more than `longest` tokens are left out."""
    found = []
    for row in rows:
        asked = prompt(row.question)
        ids = (*asked, *answer(row.answer), stop)
        if len(ids) <= longest + 1:
            found.append(Example(ids, len(asked)))
    return found


@dataclass(frozen=True)
class Dialogues:
    """Batches of examples in a seeded order; that of a step depends on nothing but its number.

    Rows of a batch are of about one length, so that little of it is padding.
    """

    examples: Sequence[Example]
    batch: int
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stream(self) -> np.ndarray:
        """All token ids one after the other: what identifies the data."""
        return np.concatenate([np.asarray((example.start, *example.ids), np.int32) for example in self.examples])

    def _order(self, epoch: int) -> list[int]:
        """A shuffle in which ALIKE batches are sorted by length together, and shuffled again as whole batches."""
        if epoch not in self._orders:
            random = np.random.default_rng((self.seed, epoch))
            shuffled = random.permutation(len(self.examples)).tolist()
            span, batches = ALIKE * self.batch, []
            for first in range(0, len(shuffled), span):
                near = sorted(shuffled[first : first + span], key=lambda i: len(self.examples[i].ids))
                batches += [near[i : i + self.batch] for i in range(0, len(near), self.batch)]
            self._orders.clear()
            self._orders[epoch] = [i for b in random.permutation(len(batches)) for i in batches[b]]
        return self._orders[epoch]

    def _chosen(self, step: int) -> list[Example]:
        found = []
        for number in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(number, len(self.examples))
            found.append(self.examples[self._order(epoch)[place]])
        return found

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids [batch, T + 1], padded at the end; targets [batch, T], IGNORED but for the answers)."""
        return collate(self._chosen(step))


def collate(chosen: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples side by side. What pads is never seen by what stands before it, and is no target."""
    width = max(len(example.ids) for example in chosen)
    ids = torch.zeros(len(chosen), width, dtype=torch.int64)
    targets = torch.full((len(chosen), width - 1), IGNORED, dtype=torch.int64)
    for row, example in enumerate(chosen):
        values = torch.tensor(example.ids)
        ids[row, : len(values)] = values
        targets[row, example.start - 1 : len(values) - 1] = values[example.start :]
    return ids, targets
