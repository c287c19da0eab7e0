"""Text files to token windows: documents, those held out, the tokenizer, and the batch of every step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..config import MiB
from ..errors import UsageError

END = "<|endoftext|>"  # between documents, and before the first token of one
HELD_OUT = 32  # one document of so many is kept apart
LONGEST_LINE = 16 * MiB  # bytes; a longer one is no prose, and would take the tokenizer's memory with it


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The documents of text files, split at `<|endoftext|>`, stripped, empty ones dropped.

    Raises UsageError for a file that is missing, empty, not UTF-8 text, or one endless line.
    """
    documents: list[str] = []
    for path in paths:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
        if b"\0" in raw:
            raise UsageError(f"{path} is binary, not text.", "Training takes plain UTF-8 text files.")
        if max((len(line) for line in raw.splitlines()), default=0) > LONGEST_LINE:
            raise UsageError(
                f"{path} has a line of more than {LONGEST_LINE // MiB} MiB, which is no prose.",
                f"Break its text into lines, and its documents with {END}.",
            )
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 text (byte {error.start}).", "Convert it first: iconv -t UTF-8."
            ) from None
        found = [stripped for part in text.split(END) if (stripped := part.strip())]
        if not found:
            raise UsageError(f"{path} holds no text.")
        documents += found
    return documents


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(to train on, held out): by a hash of the text, so that no order and no other file changes where one falls.

    Copies of a document fall on the same side. At least one document is held out where there are two.
    """
    train: list[str] = []
    held: list[str] = []
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()
        (held if int.from_bytes(digest[:4]) % HELD_OUT == 0 else train).append(document)
    if not held and len(train) > 1:
        held.append(train.pop())
    if not train or not held:
        raise UsageError(
            "One document cannot be both learned and held out.", f"Separate documents with {END}, or give more text."
        )
    return train, held


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries; every sequence starts with `<|endoftext|>`, id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """All documents as one int32 stream, each behind an END, and an END last."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents)):
        ids += encoding.ids
    return np.array([*ids, 0], dtype=np.int32)


@dataclass(frozen=True)
class Batches:
    """Windows of `sequence` + 1 tokens in a seeded order. Batch `step` depends on nothing but its number."""

    stream: np.ndarray
    sequence: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.stream) < 2 * self.sequence + 1:
            raise UsageError(
                f"The text is {len(self.stream):,} tokens, too few for sequences of {self.sequence}.",
                "Give more text, or a smaller --sequence.",
            )

    @property
    def per_epoch(self) -> int:
        """Windows of one pass over the stream; its start shifts from pass to pass."""
        return (len(self.stream) - self.sequence - 1) // self.sequence

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.per_epoch)
        random = np.random.default_rng((self.seed, epoch))
        shift = int(random.integers(self.sequence))
        start = shift + int(random.permutation(self.per_epoch)[place]) * self.sequence
        return self.stream[start : start + self.sequence + 1]

    def __call__(self, step: int) -> torch.Tensor:
        """Token ids int64 [batch, sequence + 1] of step `step`, from 0."""
        windows = [self._window(step * self.batch + i) for i in range(self.batch)]
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def windows_of(stream: np.ndarray, sequence: int, batch: int) -> Iterator[torch.Tensor]:
    """All of a stream once, for evaluation: int64 [<= batch, <= sequence + 1], each token predicted exactly once."""
    full = (len(stream) - 1) // sequence
    starts = [i * sequence for i in range(full)]
    for first in range(0, full, batch):
        rows = [stream[s : s + sequence + 1] for s in starts[first : first + batch]]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))
    if len(rest := stream[full * sequence :]) > 1:
        yield torch.from_numpy(rest[None].astype(np.int64))
