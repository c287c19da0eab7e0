"""The models that ship: small enough, as good as their cards say, and sparse in the ways they are there for."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest
import torch

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps.evaluate import evaluate
from flashinfer_cli.cli import main
from flashinfer_cli.config import RunConfig, SamplingParams
from flashinfer_cli.training.data import END, HELD_OUT

ALL = ("stories-relu", "stories-moe", "stories-mod", "stories-draft")
TUNED = "stories-moe-instruct"
MOST_BYTES = 24 * 2**20  # of weights


def stories() -> list[str]:
    return [story.strip() for story in zoo.HELD_OUT.read_text(encoding="utf-8").split(END)]


def test_all_are_there_and_small():
    assert set(zoo.names()) == {*ALL, TUNED} and zoo.names()[0] == zoo.DEFAULT
    weights = [file for file in Path(zoo.HOME).rglob("*.safetensors") if file.is_file()]
    assert sum(file.stat().st_size for file in weights) <= MOST_BYTES
    assert sum(zoo.nbytes(name) for name in zoo.names()) == sum(file.stat().st_size for file in weights)
    assert len({(zoo.HOME / name / "tokenizer.json").read_bytes() for name in zoo.names()}) == 1


def test_the_excerpt_is_of_what_was_held_out():
    """By the rule of training.data.split, which looks at nothing but the text."""
    for story in stories():
        assert int.from_bytes(hashlib.sha256(story.encode()).digest()[:4]) % HELD_OUT == 0


@pytest.mark.parametrize("name", ALL)
def test_cards_say_what_can_be_checked(name):
    card, page = zoo.card(name), (zoo.path_of(name) / "README.md").read_text(encoding="utf-8")
    for key in ("data", "recipe", "command", "seed", "bits_per_byte", "samples", "parameters"):
        assert card[key], key
    assert "CDLA" in page and card["command"] in page and len(card["samples"]) == 3
    assert card["bits_per_byte"] < 0.9 * card["bits_per_byte_4gram"]


@pytest.mark.parametrize("name", ALL)
def test_held_out_loss_is_what_the_card_says(name):
    """On the first of the shipped stories, which are simpler than all that was held out, and far from a 4-gram."""
    found = evaluate(f"zoo:{name}", "\n\n".join(stories()[:8]), RunConfig())
    card = zoo.card(name)
    assert found["bits_per_byte"] < card["bits_per_byte_4gram"]
    assert found["bits_per_byte"] == pytest.approx(card["bits_per_byte"], rel=0.25)


@pytest.mark.parametrize("name", [*ALL, TUNED])
def test_streamed_is_resident(name):
    ids = None
    logits = []
    for stream in ("never", "always"):
        with fc.load(f"zoo:{name}", stream=stream) as engine:
            ids = ids or engine.tokenizer.encode(stories()[0])[:60]
            logits.append(engine.logits(ids))
    assert torch.equal(logits[0], logits[1])


def ask(engine: fc.Engine, question: str) -> tuple[str, str | None]:
    """(the greedy answer, why it ended)"""
    events = list(engine.chat().send(question, SamplingParams(max_tokens=80, temperature=0.0)))
    return "".join(event.text for event in events).strip(), events[-1].finish_reason


def test_the_tuned_one_does_what_it_is_asked():
    with fc.load(f"zoo:{TUNED}") as engine:
        for name, kind in (("Sara", "girl"), ("Max", "dog")):
            story = f"Once upon a time, there was a little {kind} named {name}. {name} liked to play in the park."
            assert ask(engine, f"What is the {kind}'s name?\n{story}") == (f"The {kind}'s name is {name}.", "stop")
        sentence = "The bird sat in the big tree."
        assert ask(engine, f"Repeat this sentence.\n{sentence}") == (sentence, "stop")
        told, _ = ask(engine, "Tell me a story about a cat.")
        assert "cat" in told


def test_the_tuned_one_s_card():
    card, page = zoo.card(TUNED), (zoo.path_of(TUNED) / "README.md").read_text(encoding="utf-8")
    for key in ("data", "command", "seed", "note", "samples", "followed", "quantized", "transcript"):
        assert card[key], key
    assert "CDLA" in page and "Apache-2.0" in page and "BSD" in page and card["command"] in page
    before, after = card["tuning"]["before"], card["tuning"]["after"]
    assert after["nats"] < before["nats"] - 0.7 and after["stop_is_likeliest"] > 0.5 > before["stop_is_likeliest"]


def test_relu_is_sparse():
    sparsity = zoo.card("stories-relu")["sparsity"]
    assert sum(sparsity) / len(sparsity) >= 0.9


def test_experts_are_used_evenly():
    experts = zoo.card("stories-moe")["experts"]
    assert len(experts["use"][0]) >= 16 and max(experts["max_over_mean"]) < 3


def test_blocks_are_skipped_at_decoding():
    """Near one minus the capacity, and not zero; step by step the same tokens as all at once."""
    with fc.load("zoo:stories-mod", kv_cache_type="f32") as engine:
        ids = engine.tokenizer.encode(stories()[1])[:150]
        whole = engine.logits(ids)
        session = engine.session()
        steps = [session.prefill(ids[:10])]
        steps += [session.step(token) for token in ids[10:]]
        assert (torch.stack(steps) - whole[9:]).abs().max() < 1e-4
        skipped = engine.report().decode.skipped
        assert skipped is not None and 0.8 < skipped < 0.95


def test_the_default_is_named_and_tells_a_story(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert main.run(["generate", "-p", "Once upon a time", "-n", "40", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert f"zoo:{zoo.DEFAULT}" in err and re.search(r"[a-z]+ [a-z]+", out)


def test_the_list_and_a_card(capsys):
    assert main.run(["zoo"]) == 0
    listed = capsys.readouterr().out
    assert all(f"zoo:{name}" in listed for name in zoo.names())
    assert main.run(["zoo", "stories-moe"]) == 0
    assert "Expert use" in capsys.readouterr().out
    assert main.run(["zoo", "stories-mow"]) == 1
    assert "zoo:stories-mo" in capsys.readouterr().err
