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
from flashinfer_cli.config import RunConfig
from flashinfer_cli.training.data import END, HELD_OUT

ALL = ("stories-relu", "stories-moe", "stories-mod", "stories-draft")
MOST_BYTES = 24_000_000


def stories() -> list[str]:
    return [story.strip() for story in zoo.HELD_OUT.read_text(encoding="utf-8").split(END)]


def test_all_are_there_and_small():
    assert set(zoo.names()) == set(ALL) and zoo.names()[0] == zoo.DEFAULT
    files = [file for file in Path(zoo.HOME).rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    assert len({(zoo.HOME / name / "tokenizer.json").read_bytes() for name in ALL}) == 1


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


@pytest.mark.parametrize("name", ALL)
def test_streamed_is_resident(name):
    ids = None
    logits = []
    for stream in ("never", "always"):
        with fc.load(f"zoo:{name}", stream=stream) as engine:
            ids = ids or engine.tokenizer.encode(stories()[0])[:60]
            logits.append(engine.logits(ids))
    assert torch.equal(logits[0], logits[1])


def test_relu_is_sparse():
    sparsity = zoo.card("stories-relu")["sparsity"]
    assert sum(sparsity) / len(sparsity) >= 0.9


def test_experts_are_used_evenly():
    experts = zoo.card("stories-moe")["experts"]
    assert len(experts["use"][0]) >= 16 and max(experts["max_over_mean"]) < 3


def test_blocks_are_skipped_at_decoding():
    """Near one minus the capacity, and not zero; step by step the same tokens as all at once."""
    with fc.load("zoo:stories-mod") as engine:
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
    assert all(f"zoo:{name}" in listed for name in ALL)
    assert main.run(["zoo", "stories-moe"]) == 0
    assert "Expert use" in capsys.readouterr().out
    assert main.run(["zoo", "stories-mow"]) == 1
    assert "zoo:stories-mo" in capsys.readouterr().err
