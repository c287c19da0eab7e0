"""A draft of no use lends its memory to the weights that stream, at a price that is bounded, and no bit changes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import torch
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli.config import SamplingParams
from flashinfer_cli.decoding.drafts import ModelDraft, NGramDraft
from flashinfer_cli.decoding.lending import Lending
from flashinfer_cli.decoding.speculative import ENOUGH, LENT, Speculator

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)


@dataclass
class Lender:
    """A pass of one second, of which reading what the draft displaces takes `share`."""

    share: float
    wait: float
    lent: bool = False

    def lend(self) -> None:
        assert not self.lent
        self.lent = True

    def take_back(self) -> None:
        assert self.lent
        self.lent = False


def run(
    lender: Lender, acceptance: float, tokens: int, repeatable: bool = False
) -> tuple[list[int], float, Speculator]:
    """Lengths of the runs, and the seconds of the whole; a draft token takes 0.05 s."""
    speculator = Speculator(NGramDraft(), "x", lender=lender)
    generator = torch.Generator().manual_seed(2)
    made, seconds, lengths = 0, 0.0, []
    while made < tokens:
        count, kept = speculator.choose(tokens - made - 1), 0
        while kept < count and float(torch.rand((), generator=generator)) < acceptance:
            kept += 1
        cost = 1.0 - lender.share * lender.lent + 0.02 * count
        speculator.note(count, kept, 0.05 * count, cost)
        seconds += 0.05 * count + cost
        made += kept + 1
        lengths.append(count)
    return lengths, seconds, speculator


def test_a_draft_of_no_use_leaves_and_is_looked_at_again():
    lengths, seconds, speculator = run(Lender(0.25, 0.9), 0.0, 1200)
    runs = [(drafted, len(list(group))) for drafted, group in groupby(lengths, lambda n: n > 0)]
    assert runs[0] == (False, 1) and runs[1][1] <= ENOUGH + 1  # what it may cost at first
    assert [n for drafted, n in runs if not drafted and n >= LENT][:2] == [LENT, 2 * LENT]
    assert speculator.times_lent == 3
    assert seconds < 1200 * 0.75 / 0.98  # all in all next to nothing beside plain decoding, 0.75 s a token


def test_a_useful_draft_stays_and_so_does_one_whose_memory_would_bring_nothing():
    for lender, acceptance in ((Lender(0.25, 0.9), 0.7), (Lender(0.25, 0.0), 0.1), (Lender(0.0, 0.9), 0.0)):
        assert run(lender, acceptance, 300)[2].times_lent == 0


def test_a_seed_brings_the_draft_back():
    lender = Lender(0.25, 0.9, lent=True)
    speculator = Speculator(NGramDraft(), "x", lender=lender, times_lent=1)
    assert speculator.choose(20) == 0 and lender.lent
    assert speculator.choose(20, repeatable=True) == 4 and not lender.lent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return make("llama", 0, root / "big")[0], make("llama", 1, root / "small")[0]


def test_slices_come_in_the_place_of_the_draft(folders):
    big, small = folders
    with fc.load(big, context=64, stream="always") as target, fc.load(small, context=64) as draft:
        want = [e.token_id for e in target.generate([5, 6, 7], GREEDY)]
        guesses = [e.token_id for e in draft.generate([5, 6, 7], GREEDY)]
        lending, streamed = Lending(target.decoder, draft.decoder), target.decoder.streamed
        held = draft.decoder.rt.feed.pinned_bytes
        assert held > 0 and 0 < lending.share <= 1 and not lending.lent
        events = target.generate([5, 6, 7], GREEDY)
        got = [next(events).token_id for _ in range(4)]
        lending.lend()  # between two passes, with slices of the next one on their way
        assert lending.lent and draft.decoder.rt.feed.pinned_bytes == 0
        assert 0 < target.decoder.rt.feed.pinned_bytes <= held
        assert len(target.decoder.streamed) == len(streamed) - len(lending.taken)
        got += [next(events).token_id for _ in range(4)]
        lending.take_back()
        assert got + [e.token_id for e in events] == want
        assert target.decoder.streamed == streamed and target.decoder.rt.feed.pinned_bytes == 0
        assert draft.decoder.rt.feed.pinned_bytes == held and not lending.lent
        assert [e.token_id for e in draft.generate([5, 6, 7], GREEDY)] == guesses


def test_text_is_the_same_while_it_is_away_and_when_it_is_back(folders, monkeypatch):
    big, small = folders
    with fc.load(big, context=64, stream="always") as target, fc.load(small, context=64) as draft:

        def texts(params: SamplingParams) -> list[int]:
            return [event.token_id for event in target.generate([5, 6, 7], params)]

        want = texts(GREEDY)
        target.speculator = Speculator(ModelDraft(draft.session(), draft.config.vocab_size, lambda: None), "small")
        seeded = texts(SEEDED)
        lending = target.speculator.lender = Lending(target.decoder, draft.decoder)
        monkeypatch.setattr(Speculator, "_of_no_use", lambda self, rate: self._since >= 1)
        assert texts(GREEDY) == want and lending.lent  # gave up on the way
        assert target.report().speculation["times_lent"] == 1
        assert texts(SEEDED) == seeded and not lending.lent
