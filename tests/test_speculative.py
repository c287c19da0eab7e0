"""Drafts change the speed only: the distribution by statistics, greedy text to the bit, the arithmetic by the paper."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli.cli.report_tables import report_tables
from flashinfer_cli.config import SamplingParams
from flashinfer_cli.decoding.drafts import ModelDraft, NGramDraft, SelfDraft
from flashinfer_cli.decoding.generate import _tokens
from flashinfer_cli.decoding.sampling import make_sampler
from flashinfer_cli.decoding.speculative import (
    Costs,
    Speculator,
    accept,
    expected_speedup,
    expected_tokens,
)
from flashinfer_cli.errors import UsageError
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.shape import Shape

V = 6
DRAWS = int(os.environ.get("SPECULATIVE_DRAWS", "4000"))  # the statistics were also run with 100,000
LOOSE = math.sqrt(20_000 / DRAWS)

# ------------------------------------------------------------------ the distribution


class Table:
    """A model of V tokens: logits by the last token, and a worse one of the same kind as its draft."""

    def __init__(self, seed: int, heat: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(V, V, generator=generator) * 1.5
        self.draft = self.target + torch.randn(V, V, generator=generator) * heat


def run_of_two(table: Table, params: SamplingParams, how: str, draws: int = DRAWS) -> torch.Tensor:
    """Counts [V, V] of the first two tokens that follow token 0, drafted two at a time in the manner `how`."""
    sampler = make_sampler(params.resolved({}))
    plain = make_sampler(SamplingParams(temperature=1.0).resolved({}))
    generator = torch.Generator().manual_seed(11)
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
                drafted.append(token)
                rows.append(q)
                at = token
            states = [last, *drafted]
            judge = torch.Generator().manual_seed(5) if how == "re-seeded" else generator
            kept, token = accept(
                [p[s] for s in states], drafted, None if rows[0] is None else torch.stack(rows), sampler, judge
            )
            made += [*drafted[:kept], token]
            last = made[-1]
        counts[made[0], made[1]] += 1
    return counts


def distance(table: Table, params: SamplingParams, how: str) -> tuple[float, float]:
    """(chi-square a degree of freedom, total variation) against what the target's own sampling gives."""
    sampler = make_sampler(params.resolved({}))
    p = torch.stack([sampler.probs(row) for row in table.target])
    want = p[0][:, None] * p
    counts = run_of_two(table, params, how)
    expected = want * counts.sum()
    enough = expected > 5
    assert counts[want == 0].sum() == 0 or how in ("argmax", "no temperature", "re-seeded")
    chi = ((counts - expected)[enough].square() / expected[enough]).sum() / max(1, int(enough.sum()) - 1)
    return float(chi), float((counts / counts.sum() - want).abs().sum() / 2)


SETTINGS = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_k=4),
    SamplingParams(temperature=1.0, top_p=0.8),
)


@pytest.mark.parametrize("how", ["drawn", "certain"])
@pytest.mark.parametrize("params", SETTINGS, ids=["T=1", "T=0.7", "top-k", "top-p"])
def test_the_distribution_is_the_targets(params, how):
    chi, variation = distance(Table(1, 0.8), params, how)
    assert chi < 2.2 and variation < 0.02 * LOOSE


@pytest.mark.parametrize("how", ["argmax", "no temperature", "re-seeded"])
def test_wrong_ways_are_found_out(how):
    chi, variation = distance(Table(1, 0.8), SETTINGS[1], how)
    assert chi > 3 and variation > 0.02 * LOOSE


class TableSession:
    """What the loop of decoding asks of a session, and what a draft asks of a model, answered from a table."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.ids, self.kv = table, [], self
        self.capacity, self.keys, self.rt, self.head = 10_000, [torch.zeros(1)], self, self
        self.mode, self.is_here = SimpleNamespace(decoding=False, here=False), True

    @property
    def length(self) -> int:
        return len(self.ids)

    def verify(self, tokens, logits="all", *, more=False) -> torch.Tensor:
        self.ids += tokens
        return self.table[list(tokens)][0 if logits == "all" else -1 :]

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

    def emitted(self, tokens: int) -> None:
        return


SEQUENCE = 40


@pytest.mark.parametrize("kind", ["model", "self", "ngram"])
@pytest.mark.parametrize("params", SETTINGS, ids=["T=1", "T=0.7", "top-k", "top-p"])
def test_every_draft_leaves_the_distribution(kind, params):
    """Whole sequences by the loop of decoding and the drafts as they are: each step from token to token is counted."""
    table, params = Table(2, 0.8), params.resolved({})
    sampler, generator = make_sampler(params), torch.Generator().manual_seed(21)
    counts = torch.zeros(V, V)
    speculator = None
    for _ in range(DRAWS // SEQUENCE):
        session = TableSession(table.target)
        draft = {
            "model": lambda: ModelDraft(TableSession(table.draft), V, lambda: None),
            "self": lambda at=session: SelfDraft(TableSession(table.draft), at, V),
            "ngram": NGramDraft,
        }[kind]()
        speculator = Speculator(draft, kind, fixed=3) if speculator is None else speculator
        speculator.draft = draft
        made = [0, *_tokens(session, [0], SEQUENCE, sampler, generator, speculator, False, None)]
        assert len(made) == SEQUENCE + 1
        for a, b in pairwise(made):
            counts[a, b] += 1
    p = torch.stack([sampler.probs(row) for row in table.target])
    expected = counts.sum(1, keepdim=True) * p
    enough = expected > 5
    assert not counts[p == 0].any()
    chi = ((counts - expected)[enough].square() / expected[enough]).sum() / int((enough.sum(1) - 1).clamp(min=0).sum())
    variation = float((counts - expected).abs().sum() / 2 / counts.sum())
    assert float(chi) < 2.2 and variation < 0.02 * LOOSE
    said = speculator.report()
    assert said["accepted"] > 0 and said["accepted"] < said["drafted"]
    if kind != "ngram":  # whose luck is not independent from token to token
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


# ------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize(
    ("acceptance", "drafted", "cost", "speedup"),
    [(0.75, 7, 0.02, 3.2), (0.80, 7, 0.04, 3.3), (0.82, 7, 0.11, 2.5), (0.62, 7, 0.02, 2.3), (0.68, 5, 0.04, 2.4),
     (0.71, 3, 0.11, 2.0), (0.65, 5, 0.02, 2.4), (0.73, 5, 0.04, 2.6), (0.74, 3, 0.11, 2.0), (0.53, 5, 0.02, 1.9),
     (0.55, 3, 0.04, 1.8), (0.56, 3, 0.11, 1.6)],
)  # fmt: skip
def test_the_papers_speedups(acceptance, drafted, cost, speedup):
    """2211.17192, T5-XXL with drafts of 77M, 250M and 800M: En-De and CNN/DM, T=0 and T=1; alpha has two digits."""
    least, most = (expected_speedup(acceptance + e, drafted, cost) for e in (-0.005, 0.005))
    assert least - 0.06 < speedup < most + 0.06


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("drafted", [1, 4, 8])
def test_tokens_a_pass(acceptance, drafted):
    """Runs of independent coin tosses bring (1 - a^(g+1)) / (1 - a) tokens."""
    tosses = torch.rand(40_000, drafted, generator=torch.Generator().manual_seed(1)) < acceptance
    brought = tosses.long().cumprod(1).sum(1) + 1
    assert float(brought.float().mean()) == pytest.approx(expected_tokens(acceptance, drafted), rel=0.02)
    assert expected_tokens(1.0, 5) == 6


def simulated(acceptance: float, draft: float, fixed: float, each: float, passes: int = 60) -> list[int]:
    """Lengths that `auto` settles on where drafting costs `draft` a token and a pass fixed + each n."""
    speculator = Speculator(NGramDraft(), "x")
    generator = torch.Generator().manual_seed(2)
    chosen = []
    for _ in range(passes):
        count = speculator.choose(16)
        chosen.append(count)
        kept = 0
        while kept < count and float(torch.rand((), generator=generator)) < acceptance:
            kept += 1
        speculator.note(count, kept, draft * count, fixed + each * (count + 1))
    return chosen


def test_auto_drafts_far_where_a_pass_costs_reading():
    streamed = simulated(0.8, draft=0.02, fixed=1.0, each=0.01)
    resident = simulated(0.8, draft=0.02, fixed=0.02, each=0.05)
    assert sum(streamed[-20:]) / 20 > 6 > 3 > sum(resident[-20:]) / 20


def test_auto_turns_itself_off_and_looks_again():
    useless = simulated(0.05, draft=0.5, fixed=0.5, each=0.5, passes=200)
    assert sum(useless[10:]) < 40 and any(useless[60:])  # a trial now and then
    assert 0 in useless[10:]


def test_costs_are_a_line():
    costs = Costs()
    for n in (1, 3, 5, 2, 8):
        costs.add(n, 0.2 + 0.05 * n)
    assert costs.of(16) == pytest.approx(1.0, rel=0.01) and costs.of(1) == pytest.approx(0.25, rel=0.01)
    flat = Costs()
    flat.add(4, 1.0)
    assert flat.of(1) == flat.of(9) == pytest.approx(1.0)


def test_a_stall_is_not_the_price_of_a_longer_run():
    costs = Costs()
    for n in (1, 5, 9, 5):
        costs.add(n, 1.0)
    costs.add(9, 30.0)
    assert costs.of(9) < 1.6 and costs.of(1) > 0.8
    for _ in range(40):
        costs.add(9, 4.0)  # but what lasts is believed
    assert costs.of(9) == pytest.approx(4.0, rel=0.05)


def test_reading_the_prompt_is_not_the_price_of_drafting(pair):
    big, small = pair
    with fc.load(small, context=120) as engine:
        draft = ModelDraft(engine.session(), engine.config.vocab_size, lambda: None)
        sampler = make_sampler(SamplingParams(temperature=0.0).resolved({}))
        draft.propose(list(range(3, 83)), 2, sampler, torch.Generator())
        assert draft.catching_up > 0
        draft.propose(list(range(3, 85)), 2, sampler, torch.Generator())
        assert draft.catching_up == 0
    prompt = list(range(3, 83))
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    with fc.load(big, context=120, draft=str(small), speculate="auto") as engine:
        plain = engine.speculator.draft.propose

        def slow(*args):
            found = plain(*args)
            engine.speculator.draft.catching_up = 1000.0
            return found

        engine.speculator.draft.propose = slow
        list(engine.generate(prompt, params))
        assert engine.speculator._draft_seconds < 0


def test_the_text_itself_as_draft():
    draft, sampler = NGramDraft(), make_sampler(SamplingParams(temperature=0.0).resolved({}))
    generator = torch.Generator()
    assert draft.propose([1, 2, 3, 4, 9, 2, 3], 3, sampler, generator) == ([4, 9, 2], None)
    assert draft.propose([5, 1, 2, 7, 1, 2, 8, 1, 2], 1, sampler, generator) == ([8], None)  # the latest
    assert draft.propose([1, 2, 3], 3, sampler, generator) == ([], None)
    assert draft.propose([1], 3, sampler, generator) == ([], None)


# ------------------------------------------------------------------ whole models


def text_of(path: Path, prompt: list[int], params: SamplingParams, **options) -> tuple[list[int], fc.RunReport]:
    with fc.load(path, context=120, **options) as engine:
        events = list(engine.generate(prompt, params))
        return [event.token_id for event in events], engine.report()


FAMILIES = [("llama", 0), ("qwen2", 0), ("gemma2", 0), ("opt", 0), ("mixtral", 0), ("phi", 0)]


@pytest.mark.parametrize(("family", "index"), FAMILIES, ids=lambda value: str(value))
def test_greedy_text_is_the_same(family, index, tmp_path):
    """Prompts that repeat themselves, drafts by lookup and by the model itself, which is always right."""
    folder, _ = make(family, index, tmp_path / "m")
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 100, (5,), generator=generator).tolist() * 2 for _ in range(8)]
    params = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True)
    with fc.load(folder, context=64, stream="always") as engine, fc.load(folder, context=64) as other:
        for prompt in prompts:
            engine.speculator = None
            want = [event.token_id for event in engine.generate(prompt, params)]
            own = Speculator(ModelDraft(other.session(), other.config.vocab_size, other.close), "itself", fixed=5)
            for engine.speculator in (Speculator(NGramDraft(), "ngram", fixed=3), own):
                assert [event.token_id for event in engine.generate(prompt, params)] == want
            assert own.accepted == own.drafted > 8
        engine.speculator = None


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A target and a smaller model that is a little like it."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = data.train_tokenizer(["the cat sat on the mat and the dog sat on the cat"], 300)
    paths = []
    for name, width in (("big", 64), ("small", 32)):
        torch.manual_seed(1)
        model = Decoder(Shape(vocab_size=300, hidden_size=width, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=2))  # fmt: skip
        with torch.no_grad():
            model.embed_tokens.weight.zero_()
            model.embed_tokens.weight[:, :32] = torch.randn(300, 32, generator=torch.Generator().manual_seed(7)) * 0.4
            for block in model.layers:
                block.self_attn.o_proj.weight.mul_(0.3)
                block.mlp.down_proj.weight.mul_(0.3)
        (folder / name).mkdir()
        write_folder(model, tokenizer, folder / name)
        paths.append(folder / name)
    return paths[0], paths[1]


def test_a_draft_model_changes_nothing_but_the_passes(pair):
    big, small = pair
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    want, plain = text_of(big, [5, 6, 7], params)
    for speculate in ("auto", "1", "8"):
        got, report = text_of(big, [5, 6, 7], params, draft=str(small), speculate=speculate)
        assert got == want
        said = report.speculation
        assert said["accepted"] > 0 and report.decode.passes < plain.decode.passes
        assert report.decode.tokens == plain.decode.tokens == 59
        assert said["tokens_per_pass"] == pytest.approx(59 / report.decode.passes)


def test_a_seed_gives_the_same_text_again(pair):
    big, small = pair
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    texts = [text_of(big, [5, 6, 7], params, draft=str(small), speculate=s)[0] for s in ("auto", "auto", "4", "4")]
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(texts[0]) == 40


def test_stops_inside_an_accepted_run(pair):
    big, _ = pair
    free = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    want, _ = text_of(big, [5, 6, 7], free)
    for place in (1, 2, 5, 11):
        stop = want[place]
        first = want.index(stop)
        params = SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=(stop,))
        got, _ = text_of(big, [5, 6, 7], params, draft=str(big), speculate="8")
        assert got == want[: first + 1]
    for most in (1, 2, 7):
        got, _ = text_of(big, [5, 6, 7], SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True),
                         draft=str(big), speculate="8")  # fmt: skip
        assert got == want[:most]


def test_a_session_goes_on_as_after_plain_decoding(pair):
    """Stopped inside a run and continued; and a conversation of two turns, by a model and by the text as drafts."""
    big, small = pair
    (big / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    found = []
    for options in ({}, {"draft": str(small), "speculate": "8"}, {"draft": "ngram"}, {"draft": "self"}):
        with fc.load(big, context=400, **options) as engine:
            session = engine.session()
            events = engine.continue_session(session, [5, 6, 7], params)
            first = [next(events).token_id for _ in range(9)]
            events.close()
            held = list(session.ids)
            assert session.kv.length == len(held)
            then = [event.token_id for event in engine.continue_session(session, first[-1:], params)]
            talk = engine.chat()
            turns = ["".join(e.text for e in talk.send(words, params)) for words in ("the cat", "and the dog")]
            found.append((first, held, then, turns))
    assert found[0] == found[1] == found[2] == found[3] and len(found[0][1]) == 11


def test_the_end_of_the_context(pair):
    big, small = pair
    params = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
    with fc.load(big, context=20) as engine:
        want = [event.token_id for event in engine.generate([5, 6, 7], params)]
    with fc.load(big, context=20, draft=str(small), speculate="8") as engine:
        assert [event.token_id for event in engine.generate([5, 6, 7], params)] == want
    assert len(want) == 18


def test_another_tokenizer_is_refused(pair, tmp_path):
    big, _ = pair
    torch.manual_seed(0)
    other = Decoder(Shape(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2))  # fmt: skip
    (tmp_path / "o").mkdir()
    write_folder(other, data.train_tokenizer(["zebras quietly juggle oxen"], 300), tmp_path / "o")
    with pytest.raises(UsageError, match=r"another tokenizer: id \d+ is"):
        fc.load(big, draft=str(tmp_path / "o"))
    for wrong in ({"speculate": "4"}, {"speculate": "often", "draft": "ngram"}, {"speculate": "99", "draft": "ngram"}):
        with pytest.raises(UsageError, match="--speculate"):
            fc.load(big, **wrong)


def test_the_account_adds_up(pair):
    big, small = pair
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    _, report = text_of(big, [5, 6, 7], params, draft=str(small), speculate="3")
    said = report.speculation
    assert sum(said["lengths"]) == said["drafted"] and len(said["lengths"]) == said["passes"]
    assert said["accepted"] + said["passes"] == 29 and 0 <= said["acceptance"] <= 1
    drafts = next(table for table in report_tables(report.to_dict()) if table.title == "Drafts")
    shown = dict(drafts.rows)
    assert shown["tokens a pass"].startswith(f"{said['tokens_per_pass']:.2f} (")
    assert len(shown["drafted a pass, over time"].split()) in range(2, 9)
    assert math.isfinite(said["estimated_speedup"]) and "drafts:" in report.summary()
