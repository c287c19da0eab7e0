"""Instruction rows to token rows: read from JSONL, split, and batched with targets on the answers only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UsageError
from .data import HELD_OUT
from .objective import IGNORED as IGNORED

Messages = list[dict[str, str]]
ALIKE = 32  # batches whose rows are sorted by length among each other
TEMPLATE = (  # for models that have none; its answers end with the model's end of text
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}### Instruction:\n{{ message['content'] }}\n### Answer:\n{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Row:
    """What is asked and what is answered, after turns (question, answer) that went before."""

    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    source: str = ""  # where the row is from, where it says so


@dataclass(frozen=True)
class Example:
    """Token ids of one row; `answers` are the spans [start, end) of its answers, their stop tokens included."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    source: str = ""


def read_rows(path: Path) -> list[Row]:
    """Rows {"instruction": ..., "input": ..., "output": ..., "history": [[question, answer], ...], "source": ...} of a
    JSONL file, blank lines skipped; input, history and source may be missing.

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
    history = found.get("history") or []
    if not isinstance(history, list) or not all(_is_turn(turn) for turn in history):
        raise UsageError(f"{where} has no [question, answer] pairs under 'history'.", hint)
    instruction, given, output = (str(part).strip() for part in parts)
    return Row(
        f"{instruction}\n{given}" if given else instruction,
        output,
        tuple((asked.strip(), answered.strip()) for asked, answered in history),
        str(found.get("source") or ""),
    )


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) and text.strip() for text in turn)


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
    rows: Sequence[Row],
    prompt: Callable[[Messages], list[int]],
    encode: Callable[[str], list[int]],
    stop: int,
    longest: int,
) -> list[Example]:
    """Rows as token ids; `prompt` gives those of messages up to where an answer begins, `encode` those of an answer.

    Rows of more than `longest` tokens are left out.
    Of a row with a history all answers are learnt. Raises UsageError for a chat template under which what follows does
    not begin with what went before.
    """
    found = []
    for row in rows:
        messages: Messages = []
        ids: list[int] = []
        answers = []
        for question, answer in (*row.history, (row.question, row.answer)):
            messages.append({"role": "user", "content": question})
            asked = prompt(messages)
            if asked[: len(ids)] != ids:
                raise UsageError(
                    "Under the model's chat template a later turn changes what stands before it.",
                    "Leave out rows with a history.",
                )
            messages.append({"role": "assistant", "content": answer})
            ids = [*asked, *encode(answer), stop]
            answers.append((len(asked), len(ids)))
        if len(ids) <= longest + 1:
            found.append(Example(tuple(ids), tuple(answers), row.source))
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
        return np.concatenate(
            [np.asarray((*(n for span in e.answers for n in span), *e.ids), np.int32) for e in self.examples]
        )

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
        for start, end in example.answers:
            targets[row, start - 1 : end - 1] = values[start:end]
    return ids, targets
