"""What may guess the next tokens: another model, the model itself with what is in memory, or the text itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from .judging import Second
from .sampling import Sampler

if TYPE_CHECKING:
    from ..cache.kv import KVCache
    from ..models.decoder import Decoder
    from ..tokenizer import Tokenizer
    from .generate import Session

AT_ONCE = 32  # tokens that a draft reads as decoding; more are a prompt
LONGEST, SHORTEST = 6, 2  # tokens of a suffix that is looked for
LOOKED_AT = 64  # places of its last pair, the latest first


class NGramDraft:
    """Prompt lookup: what followed when the last few tokens stood in the text before. No model, nothing read.

    The longest suffix that occurs earlier decides, its latest occurrence first. Where each pair of tokens stood is
    kept from call to call, so that a token costs microseconds in a text of any length.
    """

    catching_up = 0.0
    repeatable = True
    belief, step = 0.45, 0.0
    seconds: Sequence[Second] = ()

    def __init__(self) -> None:
        self._read: list[int] = []
        self._behind: dict[tuple[int, int], list[int]] = {}  # a pair: the places behind it, in order

    def propose(
        self, ids: Sequence[int], count: int, sampler: Sampler, generator: torch.Generator
    ) -> tuple[list[int], torch.Tensor | None]:
        text = list(ids)
        if len(text) <= SHORTEST:
            return [], None
        self._remember(text)
        longest, start = 0, 0
        for place in self._behind.get((text[-2], text[-1]), [])[: -LOOKED_AT - 1 : -1]:
            same = SHORTEST
            while same < min(LONGEST, place) and text[place - 1 - same] == text[-1 - same]:
                same += 1
            if same > longest:
                longest, start = same, place
            if longest == LONGEST:
                break
        if not longest:
            return [], None
        period = len(text) - start  # where a run goes on past the end of the text, the text goes on as its own copy
        return [text[start + i % period] for i in range(count)], None

    def _remember(self, text: list[int]) -> None:
        """Pairs that have something behind them in the text."""
        if text[: len(self._read)] != self._read:
            self._read, self._behind = [], {}
        for place in range(max(SHORTEST, len(self._read)), len(text)):
            self._behind.setdefault((text[place - 2], text[place - 1]), []).append(place)
        self._read = text

    def close(self) -> None:
        return


class ModelDraft:
    """A small model with the target's tokenizer, resident, drawing under the same sampling as the target."""

    repeatable = True
    belief, step = 0.7, 0.1

    def __init__(self, session: Session, vocab_size: int, close: Callable[[], None], width: int = 0) -> None:
        self.session, self.vocab_size, self.close, self.width = session, vocab_size, close, width
        self.seconds: list[Second] = []
        self.catching_up = 0.0

    def propose(
        self, ids: Sequence[int], count: int, sampler: Sampler, generator: torch.Generator
    ) -> tuple[list[int], torch.Tensor | None]:
        session = self.session
        count = min(count, session.kv.capacity - len(ids))
        if count < 1:
            return [], None
        same = 0
        for ours, theirs in zip(session.ids, ids, strict=False):
            if ours != theirs:
                break
            same += 1
        session.trim(min(same, len(ids) - 1))
        behind, begin = list(ids[len(session.ids) :]), time.perf_counter()
        logits = session.prefill(behind)[None] if len(behind) > AT_ONCE else session.verify(behind, "last")
        self.catching_up = time.perf_counter() - begin if len(behind) > AT_ONCE else 0.0
        drafted: list[int] = []
        rows: list[torch.Tensor] = []
        self.seconds = []
        for index in range(count):
            row = logits[-1].float().cpu()[: self.vocab_size]
            drafted.append(_guess(row, [*ids, *drafted], sampler, generator, rows, self.seconds, self.width))
            if index + 1 < count:
                logits = session.verify([drafted[-1]], "last")
        return drafted, torch.stack(rows)


class SelfDraft:
    """The model itself with what of it is in memory: resident experts, neurons and layers, and nothing is read.

    An expert that is away gives its place to the best of those that are here; a neuron or a layer is left out. Keys
    and values stand behind the target's own and are dropped when the run is drafted, so the target never sees them.
    """

    catching_up = 0.0
    repeatable = False
    belief, step = 0.7, 0.3

    def __init__(self, decoder: Decoder, kv: KVCache, vocab_size: int, width: int = 0) -> None:
        self.decoder, self.kv, self.vocab_size, self.width = decoder, kv, vocab_size, width
        self.seconds: list[Second] = []

    @property
    def able(self) -> bool:
        """Without its head a model says nothing."""
        return self.decoder.head.is_here

    def propose(
        self, ids: Sequence[int], count: int, sampler: Sampler, generator: torch.Generator
    ) -> tuple[list[int], torch.Tensor | None]:
        start = self.kv.length
        assert start == len(ids) - 1
        count = min(count, self.kv.capacity - start)
        if count < 1 or not self.able:
            return [], None
        drafted: list[int] = []
        rows: list[torch.Tensor] = []
        self.seconds = []
        mode = self.decoder.rt.mode
        mode.decoding = mode.here = True
        try:
            with torch.inference_mode():
                for _ in range(count):
                    last = torch.tensor([drafted[-1] if drafted else ids[-1]], device=self.kv.keys[0].device)
                    logits = self.decoder.forward(last, self.kv)
                    assert logits is not None
                    row = logits[-1].float().cpu()[: self.vocab_size]
                    drafted.append(_guess(row, [*ids, *drafted], sampler, generator, rows, self.seconds, self.width))
        finally:
            mode.here = False
            self.kv.trim(start)
        return drafted, torch.stack(rows)

    def close(self) -> None:
        return


def _guess(
    logits: torch.Tensor, before: Sequence[int], sampler: Sampler, generator: torch.Generator,
    rows: list[torch.Tensor], seconds: list[Second], width: int,
) -> int:  # fmt: skip
    """A token by logits [V], its probabilities added to `rows`; and to `seconds`, for the first `width`, what the draft
    would say if that token were none of its vocabulary."""
    q = sampler.probs(logits, before)
    token = sampler.sample(q, generator)
    if len(rows) < width:
        others = logits.clone()
        others[token] = -torch.inf
        second = sampler.probs(others, before)
        seconds.append((sampler.sample(second, generator), second))
    rows.append(q)
    return token


def check_same_ids(target: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raises UsageError, naming the first difference, where the two do not mean the same tokens by the same ids."""
    if target.fingerprint() == draft.fingerprint():
        return
    for i in range(max(target.vocab_size, draft.vocab_size)):
        if target.id_to_token(i) != draft.id_to_token(i):
            raise UsageError(
                f"The draft {name} has another tokenizer: id {i} is {draft.id_to_token(i)!r} there and "
                f"{target.id_to_token(i)!r} in the model.",
                "A draft must have the same vocabulary; or take --draft ngram.",
            )
