"""Drafts change the speed only: greedy text to the bit, sessions and reports as without them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import flashinfer_cli as fc
from flashinfer_cli.cli.report_tables import report_tables
from flashinfer_cli.config import SamplingParams
from flashinfer_cli.decoding.drafts import ModelDraft, NGramDraft
from flashinfer_cli.decoding.sampling import make_sampler
from flashinfer_cli.decoding.speculative import Speculator
from flashinfer_cli.errors import UsageError
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.shape import Shape


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
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
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
    assert draft.propose([7, 1, 2, 1, 2], 5, sampler, generator) == (
        [1, 2, 1, 2, 1],
        None,
    )  # a text that turns in circles
    assert draft.propose([1, 2, 3], 3, sampler, generator) == ([], None)
    assert draft.propose([1], 3, sampler, generator) == ([], None)


# ------------------------------------------------------------------ whole models


def text_of(path: Path, prompt: list[int], params: SamplingParams, **options) -> tuple[list[int], fc.RunReport]:
    with fc.load(path, context=120, **options) as engine:
        events = list(engine.generate(prompt, params))
        return [event.token_id for event in events], engine.report()


FAMILIES = [("llama", 0), ("gemma2", 0), ("mixtral", 0)]  # bits of the others: test_speculative_bits


@pytest.mark.parametrize(("family", "index"), FAMILIES, ids=lambda value: str(value))
def test_greedy_text_is_the_same(family, index, tiny):
    """Prompts that repeat themselves, drafts by lookup and by the model itself, which is always right."""
    folder, _ = tiny(family, index)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 100, (5,), generator=generator).tolist() * 2 for _ in range(5)]
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


def test_second_guesses_change_nothing_but_the_passes(pair):
    big, small = pair
    greedy = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_tokens=30, temperature=1.0, seed=4, ignore_eos=True)
    want, _ = text_of(big, [5, 6, 7], greedy)
    for options in ({"draft": str(small), "speculate": "3"}, {"draft": str(small)}, {"draft": "self"}):
        with fc.load(big, context=120, draft_tree=2, **options) as engine:
            assert [event.token_id for event in engine.generate([5, 6, 7], greedy)] == want
            assert engine.report().speculation["second_guesses"] == 2
            texts = [[event.token_id for event in engine.generate([5, 6, 7], drawn)] for _ in range(2)]
            assert texts[0] == texts[1]


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
