"""From a prompt to tokens: a session owns one sequence's keys and values, `generate` is the one loop over it.

Ids come in and events come out; text is only touched at the edge, where a tokenizer is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ..cache.kv import KVCache
from ..config import SamplingParams
from ..device import reusing_pages
from ..errors import ContextError, UsageError
from ..models.decoder import Decoder
from ..recorder import Recorder
from .judging import accept_tree
from .sampling import Sampler, make_sampler
from .speculative import Speculator
from .stopping import StopMatcher

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenEvent:
    """One token made. `text` is what may be shown now: characters are never split, stop strings never begun."""

    index: int
    token_id: int
    text: str
    finish_reason: FinishReason | None = None


class TextStream(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class Session:
    """One sequence: its ids, its keys and values, and how to go on."""

    def __init__(
        self, decoder: Decoder, kv: KVCache, recorder: Recorder, *, chunk: int, check: Callable[[torch.Tensor], None]
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.recorder = recorder
        self.chunk = chunk
        self.check = check  # raises when logits are not numbers
        self.ids: list[int] = []
        self.device = decoder.rt.feed.device

    def prefill(
        self, ids: Sequence[int], *, more: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> torch.Tensor:
        """Run a prompt behind what is there, a chunk at a time; returns the last position's logits [V].

        `more`: a step will follow, so its weights may be read ahead.
        """
        assert ids
        total = self.kv.length + len(ids)
        chunks = [list(ids[i : i + self.chunk]) for i in range(0, len(ids), self.chunk)]
        heads = [False] * (len(chunks) - 1) + [True]
        logits, done = None, 0
        for index, (part, head) in enumerate(zip(chunks, heads, strict=True)):
            following = heads[index + 1 : index + 2] or ([True] if more else [])
            with self._phase("prefill", len(part)), nullcontext() if self.decoder.has_experts else reusing_pages():
                logits = self._run(part, "last" if head else "none", total, following)
            done += len(part)
            if progress is not None:
                progress(done, len(ids))
        assert logits is not None
        self.check(logits)
        return logits[-1]

    def step(self, token: int, *, more: bool = False) -> torch.Tensor:
        """Run one token; returns its logits [V]."""
        with self._phase("decode", 1):
            logits = self._run([token], "last", 0, [True] if more else [])
        assert logits is not None
        self.check(logits)
        return logits[-1]

    def verify(
        self, tokens: Sequence[int], logits: Literal["last", "all"] = "all", *, beside: int = 0, more: bool = False
    ) -> torch.Tensor:
        """Run tokens as while decoding, each to the bits it would have alone; logits [n, V], or [1, V] of the last.

        The last `beside` tokens are second guesses at the second place, the third, ... (`take_beside`). Tokens count as
        decoded once the caller says how many stand (`emitted`).
        """
        mode = self.decoder.rt.mode
        mode.beside = beside
        try:
            with self._phase("decode", 0):
                out = self._run(list(tokens), logits, 0, [True] if more else [])
        finally:
            mode.beside = 0
        assert out is not None
        self.check(out)
        return out

    def take_beside(self, source: int, place: int) -> None:
        """Put the token at `source`, a second guess, where it belongs, and forget what is behind it."""
        self.kv.move(source, place)
        self.ids[place] = self.ids[source]
        self.trim(place + 1)

    def emitted(self, tokens: int) -> None:
        """Count tokens that verified passes brought."""
        self.recorder.phases["decode"].tokens += tokens

    def all_logits(
        self, ids: Sequence[int], chunk: int, phase: Literal["prefill", "decode"] = "prefill"
    ) -> Iterator[torch.Tensor]:
        """Logits of every position of `ids`, [at most chunk, V] at a time: as of a prompt, or as while decoding, which
        differ where predictors say which neurons to compute."""
        total = self.kv.length + len(ids)
        for first in range(0, len(ids), chunk):
            part = list(ids[first : first + chunk])
            with self._phase(phase, len(part)):
                logits = self._run(part, "all", total, [True] if first + chunk < len(ids) else [])
            assert logits is not None
            self.check(logits)
            yield logits

    def trim(self, length: int) -> None:
        """Rewind to the first `length` tokens."""
        self.kv.trim(length)
        del self.ids[length:]

    def _phase(self, name: Literal["prefill", "decode"], tokens: int) -> AbstractContextManager[None]:
        self.decoder.rt.feed.store.tick()
        self.decoder.rt.mode.decoding = name == "decode"
        return self.recorder.during(name, tokens)

    def _run(
        self, part: list[int], logits: Literal["none", "last", "all"], total: int, following: Sequence[bool]
    ) -> torch.Tensor | None:
        self.decoder.begin(logits != "none", following)
        try:
            with torch.inference_mode():
                out = self.decoder.forward(
                    torch.tensor(part, device=self.device.name), self.kv, logits=logits, rope_length=total
                )
                self.device.synchronize()
        except BaseException:  # whatever stopped the pass, what was read ahead for it is of no use
            self.decoder.rt.feed.end()
            self.kv.trim(self.kv.length)
            raise
        self.ids += part
        return out


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises UsageError for an empty prompt or an id outside of the vocabulary."""
    if not ids:
        raise UsageError("The prompt is empty: there is nothing to go on from.", "Give a prompt with -p or -f.")
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise UsageError(f"Token id {wrong} is outside of the vocabulary of {vocab_size}.")


def generate(
    session: Session,
    ids: Sequence[int],
    params: SamplingParams,
    *,
    text: TextStream | None,
    speculator: Speculator | None = None,
    progress: Callable[[int, int], None] | None = None,
    first_token: Callable[[float], None] = lambda seconds: None,
) -> Iterator[TokenEvent]:
    """Go on from `ids` behind what the session holds. `params` are resolved.

    Ends with an event that names its reason: a stop id (not shown), a stop string (not shown), or the length.
    """
    start = time.perf_counter()
    assert params.max_tokens is not None and params.stop_token_ids is not None
    room = session.kv.capacity - session.kv.length - len(ids) + 1
    if room < 1:
        raise ContextError(
            f"The prompt of {session.kv.length + len(ids)} tokens is longer than the context of {session.kv.capacity}.",
            f"Shorten it, or give --context {session.kv.length + len(ids) + params.max_tokens}.",
        )
    limit = min(params.max_tokens, room)
    sampler = make_sampler(params)
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    matcher = StopMatcher(params.stop)
    repeatable = params.seed is not None and not sampler.greedy
    tokens = _tokens(session, ids, limit, sampler, generator, speculator, repeatable, progress)
    try:
        for index, token in enumerate(tokens):
            if index == 0:
                first_token(time.perf_counter() - start)
            ended = token in params.stop_token_ids
            shown, hit = ("", False) if ended or text is None else matcher.push(text.push(token))
            reason: FinishReason | None = "stop" if ended or hit else "length" if index + 1 == limit else None
            if reason is not None and not hit and text is not None:
                tail, hit = matcher.push(text.flush())
                shown += tail + ("" if hit else matcher.flush())
                reason = "stop" if hit else reason
            yield TokenEvent(index, token, shown, reason)
            if reason is not None:
                return
    finally:
        tokens.close()
        session.decoder.rt.feed.end()


def _tokens(
    session: Session,
    ids: Sequence[int],
    limit: int,
    sampler: Sampler,
    generator: torch.Generator,
    speculator: Speculator | None,
    repeatable: bool,
    progress: Callable[[int, int], None] | None,
) -> Generator[int, None, None]:
    """The tokens that follow, `limit` at most, one by one or in runs that a draft proposed."""
    logits = session.prefill(ids, more=limit > 1, progress=progress)
    token = sampler.sample(sampler.probs(logits.float().cpu(), session.ids), generator)
    yield token
    made = 1
    if speculator is not None:
        speculator.begin()
    while made < limit:
        context = [*session.ids, token]
        begin = time.perf_counter()
        drafted: list[int] = []
        if speculator is not None:
            count = speculator.choose(limit - made - 1, repeatable)
            if count and (speculator.draft.repeatable or not repeatable):  # else a seed's text would hang on memory
                drafted, q = speculator.draft.propose(context, count, sampler, generator)
        drafted_in, begin = time.perf_counter() - begin, time.perf_counter()
        if not drafted:
            logits = session.step(token, more=made + 1 < limit)
            spent = time.perf_counter() - begin
            token = sampler.sample(sampler.probs(logits.float().cpu(), context), generator)
            if speculator is not None:
                speculator.note(0, 0, 0.0, spent)
            yield token
            made += 1
            continue
        assert speculator is not None
        drafted_in -= speculator.draft.catching_up
        held, run = session.kv.length, 1 + len(drafted)
        seconds = speculator.draft.seconds[: max(0, session.kv.capacity - held - run)]
        paths = [drafted[:i] for i in range(run)] + [[*drafted[:i], second] for i, (second, _) in enumerate(seconds)]
        asked = [token, *drafted, *(second for second, _ in seconds)]
        rows = session.verify(asked, beside=len(seconds), more=made + 1 < limit).float().cpu()
        spent = time.perf_counter() - begin
        p = [sampler.probs(row, [*context, *path]) for row, path in zip(rows, paths, strict=True)]
        kept, rescued, token = accept_tree(p, drafted, q, seconds, sampler, generator)
        stands = drafted[:kept]
        if rescued:
            session.take_beside(held + run + kept, held + 1 + kept)
            stands = paths[run + kept]
        else:
            session.trim(len(context) + kept)
        session.emitted(len(stands) + 1)
        speculator.note(len(drafted), kept, drafted_in, spent, len(seconds), rescued)
        for index, one in enumerate((*stands, token)):
            try:
                yield one
            except GeneratorExit:  # stopped inside a run: what stands behind was never said
                session.trim(len(context) + index)
                raise
        made += len(stands) + 1
