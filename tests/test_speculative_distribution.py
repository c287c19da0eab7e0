"""Drafts leave the distribution as it is, by statistics on a vocabulary of six; wrong ways to judge are found out.

SPECULATIVE_DRAWS=100000 python -m pytest -s tests/test_speculative_distribution.py takes more settings, tries the wrong
ways under each and prints what it finds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from flashinfer_cli.config import SamplingParams
from flashinfer_cli.decoding.drafts import ModelDraft, NGramDraft, SelfDraft
from flashinfer_cli.decoding.generate import _tokens
from flashinfer_cli.decoding.judging import Second, accept, accept_tree
from flashinfer_cli.decoding.sampling import Sampler, make_sampler
from flashinfer_cli.decoding.speculative import Speculator

V = 6
DRAWS = int(os.environ.get("SPECULATIVE_DRAWS", "4000"))
SETTINGS = {
    "T=1": SamplingParams(temperature=1.0),
    "T=0.7": SamplingParams(temperature=0.7),
    "T=0.7 top-k": SamplingParams(temperature=0.7, top_k=4),
    "T=1 top-p": SamplingParams(temperature=1.0, top_p=0.8),
    "T=1 top-k top-p": SamplingParams(temperature=1.0, top_k=4, top_p=0.9),
    "T=0.7 top-k top-p": SamplingParams(temperature=0.7, top_k=4, top_p=0.95),
}
LONG = DRAWS > 10_000
TRIED = SETTINGS if LONG else ["T=1", "T=0.7 top-k top-p"]
SUBTLE = "second judged as first"  # a few hundredths, which takes more draws to see
WRONG = [
    (how, setting)
    for how in ("argmax", "no temperature", "re-seeded", "second not drawn", *([SUBTLE] if LONG else []))
    for setting in (SETTINGS if LONG else ["T=0.7"])
    if how != "no temperature" or setting.startswith("T=0.7")
]


class Table:
    """A model of V tokens: logits by the last token, and a worse one of the same kind as its draft."""

    def __init__(self, seed: int, heat: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(V, V, generator=generator) * 1.5
        self.draft = self.target + torch.randn(V, V, generator=generator) * heat


def judged(what: str, counts: torch.Tensor, want: torch.Tensor) -> tuple[float, float, bool]:
    """(p value by chi-square, total variation, is anything there that cannot be) of counts against probabilities.

    counts, want [R, C]: each row of `want` sums to 1, and the rows are judged together. Cells that expect less than 5
    are one cell.
    """
    expected = counts.sum(1, keepdim=True).double() * want.double()
    chi, free = 0.0, 0
    for row, hoped in zip(counts.double(), expected, strict=True):
        few = hoped < 5
        cells = [*zip(row[~few].tolist(), hoped[~few].tolist(), strict=True)]
        if float(hoped[few].sum()) >= 5:
            cells.append((float(row[few].sum()), float(hoped[few].sum())))
        chi += sum((got - hope) ** 2 / hope for got, hope in cells)
        free += max(0, len(cells) - 1)
    p_value = float(torch.special.gammaincc(torch.tensor(free / 2.0).double(), torch.tensor(chi / 2).double()))
    variation = float((counts - expected).abs().sum() / 2 / counts.sum())
    impossible = bool(counts[want == 0].any())
    print(f"{what}: {int(counts.sum())} draws, chi-square {chi:.1f} at {free}, p {p_value:.2g}, TV {variation:.4f}")
    return p_value, variation, impossible


def noise(counts: torch.Tensor, want: torch.Tensor) -> float:
    """The total variation that draws from `want` itself show on average, by the normal approximation."""
    rows = counts.sum(1, keepdim=True).double()
    return float((rows * want * (1 - want) / (2 * torch.pi)).clamp(min=0).sqrt().sum() / counts.sum())


def run_of_two(table: Table, params: SamplingParams, how: str, draws: int) -> torch.Tensor:
    """Counts [V, V] of the first two tokens that follow token 0, drafted two at a time in the manner `how`."""
    sampler = make_sampler(params.resolved({}))
    plain = make_sampler(SamplingParams(temperature=1.0).resolved({}))
    generator = torch.Generator().manual_seed(12)
    p = [sampler.probs(row) for row in table.target]
    q_rows = [sampler.probs(row) for row in table.draft]
    hot = [plain.probs(row) for row in table.draft]
    counts = torch.zeros(V, V)
    for _ in range(draws):
        made: list[int] = []
        last = 0
        while len(made) < 2:
            drafted: list[int] = []
            rows: list[torch.Tensor] = []
            seconds: list[Second] = []
            at = last
            for _ in range(2):
                if how == "argmax":  # wrong: not drawn from q, but judged as if it were
                    token, q = int(q_rows[at].argmax()), q_rows[at]
                elif how == "no temperature":  # wrong: drawn from one distribution, judged by another
                    token, q = sampler.sample(hot[at], generator), q_rows[at]
                elif how == "certain":
                    token, q = int(q_rows[at].argmax()), None
                else:
                    token, q = sampler.sample(q_rows[at], generator), q_rows[at]
                if "second" in how:  # as drafts say it: what the first guess would be if it were not in the vocabulary
                    others = sampler.probs(table.draft[at].index_fill(0, torch.tensor(token), -torch.inf))
                    second = sampler.sample(others, generator)
                    if how == "second not drawn":  # wrong
                        second = int(others.argmax())
                    if how == SUBTLE:  # wrong: by a distribution that lacks what the first took
                        others = q.index_fill(0, torch.tensor(token), 0.0)
                    seconds.append((second, others))
                drafted.append(token)
                rows.append(q)
                at = token
            states = [last, *drafted, *(second for second, _ in seconds)]
            judge = torch.Generator().manual_seed(5) if how == "re-seeded" else generator
            q_all = None if rows[0] is None else torch.stack(rows)
            kept, rescued, token = accept_tree([p[s] for s in states], drafted, q_all, seconds, sampler, judge)
            made += [*drafted[:kept], *([seconds[kept][0]] if rescued else []), token]
            last = made[-1]
        counts[made[0], made[1]] += 1
    return counts


def distance(table: Table, setting: str, how: str) -> tuple[float, float, bool, float]:
    """`judged` and `noise` of pairs of tokens, against what the target's own sampling gives."""
    params = SETTINGS[setting]
    sampler = make_sampler(params.resolved({}))
    p = torch.stack([sampler.probs(row) for row in table.target])
    want = (p[0][:, None] * p).reshape(1, -1)
    draws = DRAWS // 2 if LONG else DRAWS  # of two tokens each
    draws = min(draws, 20_000) if how in [wrong for wrong, _ in WRONG] else draws
    counts = run_of_two(table, params, how, draws).reshape(1, -1)
    return (*judged(f"pairs, {how}, {setting}", counts, want), noise(counts, want))


@pytest.mark.parametrize("how", ["drawn", "certain", "with a second"])
@pytest.mark.parametrize("setting", TRIED)
def test_the_distribution_is_the_targets(setting, how):
    p_value, variation, impossible, noisy = distance(Table(1, 0.8), setting, how)
    assert p_value > 1e-3 and variation < 1.6 * noisy and not impossible


@pytest.mark.parametrize(("how", "setting"), WRONG)
def test_wrong_ways_are_found_out(how, setting):
    p_value, variation, _, noisy = distance(Table(1, 0.8), setting, how)
    assert p_value < 1e-5 and variation > 1.6 * noisy


class TableSession:
    """What the loop of decoding asks of a session, and what a draft asks of a model, answered from a table."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.ids, self.kv = table, [], self
        self.capacity, self.keys, self.rt, self.head = 10_000, [torch.zeros(1)], self, self
        self.mode, self.is_here = SimpleNamespace(decoding=False, here=False), True

    @property
    def length(self) -> int:
        return len(self.ids)

    def verify(self, tokens, logits="all", *, beside=0, more=False) -> torch.Tensor:
        self.ids += tokens
        return self.table[list(tokens)][0 if logits == "all" else -1 :]

    def step(self, token, *, more=False) -> torch.Tensor:
        return self.verify([token])[0]

    def prefill(self, ids, *, more=False, progress=None) -> torch.Tensor:
        return self.verify(list(ids), "last")[-1]

    def forward(self, last: torch.Tensor, kv: TableSession) -> torch.Tensor:
        """The same sequence, another model: what a draft from within is."""
        assert self.mode.here
        return self.table[kv.take(int(last))][None]

    def take(self, token: int) -> int:
        self.ids.append(token)
        return token

    def trim(self, length: int) -> None:
        del self.ids[length:]

    def take_beside(self, source: int, place: int) -> None:
        self.ids[place:] = [self.ids[source]]

    def emitted(self, tokens: int) -> None:
        return


@dataclass(frozen=True)
class Remembering(Sampler):
    """What `probs` made of a row is kept: it is a pure function, and here there are few rows."""

    kept: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def probs(self, logits, recent_ids=()) -> torch.Tensor:
        key = logits.numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = super().probs(logits, recent_ids)
        return self.kept[key]


SEQUENCE = 40
SEEDS = {"model": 21, "self": 22, "ngram": 23, "model tree": 24, "self tree": 25}


@pytest.mark.parametrize("kind", SEEDS)
@pytest.mark.parametrize("setting", TRIED)
def test_every_draft_leaves_the_distribution(kind, setting):
    """Whole sequences by the loop of decoding and the drafts as they are: each step from token to token is counted."""
    table, params = Table(2, 0.8), SETTINGS[setting].resolved({})
    made_sampler, generator = make_sampler(params), torch.Generator().manual_seed(SEEDS[kind])
    sampler = Remembering(made_sampler.filters, made_sampler.greedy)
    counts = torch.zeros(V, V)
    speculator = None
    for _ in range(DRAWS // SEQUENCE):
        session = TableSession(table.target)
        draft = {
            "model": lambda: ModelDraft(TableSession(table.draft), V, lambda: None),
            "self": lambda at=session: SelfDraft(TableSession(table.draft), at, V),
            "ngram": NGramDraft,
            "model tree": lambda: ModelDraft(TableSession(table.draft), V, lambda: None, 2),
            "self tree": lambda at=session: SelfDraft(TableSession(table.draft), at, V, 2),
        }[kind]()
        speculator = Speculator(draft, kind, fixed=3, width=2) if speculator is None else speculator
        speculator.draft = draft
        made = [0, *_tokens(session, [0], SEQUENCE, sampler, generator, speculator, False, None)]
        assert len(made) == SEQUENCE + 1
        for a, b in pairwise(made):
            counts[a, b] += 1
    p = torch.stack([sampler.probs(row) for row in table.target])
    p_value, variation, impossible = judged(f"sequences, {kind}, {setting}", counts, p)
    assert p_value > 1e-3 and variation < 1.6 * noise(counts, p) and not impossible
    said = speculator.report()
    assert said["accepted"] > 0 and said["accepted"] < said["drafted"]
    if "tree" in kind:
        assert speculator.rescued > 0 and said["tokens_per_pass"] > said["expected_tokens_per_pass"]
    elif kind != "ngram":  # whose luck is not independent from token to token
        assert said["tokens_per_pass"] == pytest.approx(said["expected_tokens_per_pass"], rel=0.05)


def test_an_equal_draft_always_stands():
    table, sampler = Table(3, 0.0), make_sampler(SamplingParams(temperature=0.8).resolved({}))
    generator = torch.Generator().manual_seed(0)
    for state in range(V):
        p = sampler.probs(table.target[state])
        for _ in range(200):
            token = sampler.sample(p, generator)
            assert accept([p, p], [token], p[None], sampler, generator)[0] == 1


def test_greedy_is_argmax_on_both():
    sampler = make_sampler(SamplingParams(temperature=0.0).resolved({}))
    p = [sampler.probs(torch.tensor(row)) for row in ([0.0, 3, 1], [2.0, 0, 1], [0.0, 0, 5])]
    generator = torch.Generator()
    assert accept(p, [1, 0], None, sampler, generator) == (2, 2)
    assert accept(p, [1, 2], None, sampler, generator) == (1, 0)
    assert accept(p, [0, 0], torch.eye(3)[[0, 0]], sampler, generator) == (0, 1)
