"""Instruction tuning: rows, targets, what is frozen, resuming, and a folder that chats and stops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps.tune import tune
from flashinfer_cli.cli import main
from flashinfer_cli.errors import UsageError
from flashinfer_cli.tokenizer import Tokenizer
from flashinfer_cli.training.dialogue import IGNORED, Dialogues, Example, collate, examples, read_rows
from flashinfer_cli.training.load import load_decoder

MODEL = zoo.path_of("stories-moe")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    colours = ("red", "blue", "green", "white")
    lines = [
        {"instruction": f"What colour is ball {i}?", "output": f"The ball is {colours[i % 4]}."} for i in range(80)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "is not JSON"),
        ('["a"]', "is not an object"),
        ('{"instruction": "a"}', "no text under 'output'"),
        ('{"instruction": 3, "output": "b"}', "no text under 'instruction'"),
        ('{"instruction": "a", "input": 4, "output": "b"}', "no text under 'input'"),
        ('{"instruction": "a", "output": "b", "history": [["c"]]}', "no [question, answer] pairs under 'history'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line, said, tmp_path, capsys):
    good = '{"instruction": "a", "output": "b"}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    assert main.run(["tune", str(MODEL), str(tmp_path / "out"), "--data", str(tmp_path / "bad.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "Line 3 of" in error and said in error
    assert not (tmp_path / "out").exists()


def test_targets_are_the_answers_and_their_stop():
    ids, targets = collate([Example((7, 8, 9, 5, 6, 0), ((3, 6),)), Example((7, 4, 0), ((1, 3),))])
    assert ids.tolist() == [[7, 8, 9, 5, 6, 0], [7, 4, 0, 0, 0, 0]]
    x = IGNORED
    assert targets.tolist() == [[x, x, 5, 6, 0], [4, 0, x, x, x]]


def test_batches_hold_rows_of_like_length_and_every_row_once_a_pass():
    random = np.random.default_rng(0)
    rows = [Example(tuple(range(int(n))), ((1, int(n)),)) for n in random.integers(4, 200, 96)]
    batches = Dialogues(rows, 4, seed=1)
    for epoch in (0, 1):
        chosen = [batches._chosen(epoch * 24 + step) for step in range(24)]
        assert sorted(id(r) for b in chosen for r in b) == sorted(map(id, rows))
        spread = [max(len(r.ids) for r in b) - min(len(r.ids) for r in b) for b in chosen]
        assert sum(spread) / 24 < 20  # of four at random: 117
    first = [len(b[0].ids) for b in chosen]
    assert first != sorted(first) and batches._chosen(3) == Dialogues(rows, 4, seed=1)._chosen(3)


def test_input_follows_the_instruction(tmp_path):
    row = {"instruction": "Say it again.", "input": "Hello.", "output": "Hello."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    assert read_rows(tmp_path / "rows.jsonl")[0].question == "Say it again.\nHello."


def test_all_answers_of_a_conversation_are_learnt(tmp_path):
    row = {"instruction": "Who?", "output": "Tim.", "history": [["What?", "A dog."]], "source": "talk"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    read = read_rows(tmp_path / "rows.jsonl")[0]

    def prompt(messages):  # a token a character, as a template that answers end with their stop token in
        return [ord(c) for m in messages for c in m["content"] + ("\0" if m["role"] == "assistant" else ":")]

    (example,) = examples([read], prompt, lambda text: [ord(c) for c in text], 0, 100)
    ids, targets = collate([example])
    assert "".join(map(chr, ids[0].tolist())) == "What?:A dog.\0Who?:Tim.\0" and example.source == "talk"
    assert "".join(chr(t) for t in targets[0].tolist() if t != IGNORED) == "A dog.\0Tim.\0"
    assert not examples([read], prompt, lambda text: [ord(c) for c in text], 0, 20)
    with pytest.raises(UsageError, match="template"):
        examples([read], lambda messages: prompt(messages[::-1]), lambda text: [65], 0, 100)


def test_a_folder_comes_back_as_the_model_it_was():
    model = load_decoder(MODEL).eval()
    ids = [0, 5, 300, 77, 12, 900, 41]
    with torch.no_grad(), fc.load(MODEL, stream="never", kv_cache_type="f32") as engine:
        assert (model(torch.tensor([ids]))[0][0] - engine.logits(ids)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("freeze", "still", "moved"), [("router", "gate.weight", ".w1."), ("experts", ".w1.", "gate.weight")]
)
def test_what_is_frozen_keeps_its_bits(freeze, still, moved, rows, tmp_path):
    assert tune(MODEL, tmp_path / "out", rows, steps=2, batch=2, freeze=freeze, threads=1)
    before, after = (load_file(folder / "model.safetensors") for folder in (MODEL, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before if still in name)
    assert any(not torch.equal(before[name], after[name]) for name in before if moved in name)


def test_interrupted_and_resumed_is_the_same_and_it_chats(rows, tmp_path):
    options = {"steps": 12, "batch": 4, "learning_rate": 3e-3, "threads": 1}
    found = tune(MODEL, tmp_path / "whole", rows, **options)
    calls = iter([False] * 5 + [True] * 99)
    assert tune(MODEL, tmp_path / "parts", rows, **options, stop=lambda: next(calls)) is None
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    again = tune(MODEL, tmp_path / "parts", rows, **options)
    assert again["after"] == found["after"]
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert found["after"]["nats"] < found["before"]["nats"] - 1
    assert found["after"]["stop_probability"] > found["before"]["stop_probability"]
    assert len(found["after"]["use"]) == 4 and abs(sum(found["after"]["use"][0]) - 1) < 0.01
    tokenizer = Tokenizer.from_folder(tmp_path / "whole")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]).endswith("### Answer:\n")
    with pytest.raises(UsageError, match="exists"):
        tune(MODEL, tmp_path / "whole", rows, **options)


def test_rows_of_its_own_to_judge_by_and_a_card(rows, tmp_path, monkeypatch, capsys):
    held = [{"instruction": f"Question {i}?", "output": "Yes.", "source": "ab"[i % 2]} for i in range(4)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    arguments = [
        "tune",
        str(MODEL),
        str(tmp_path / "out"),
        "--data",
        str(rows),
        "--held-out",
        str(tmp_path / "held.jsonl"),
    ]
    monkeypatch.setattr("flashinfer_cli.apps.tuned_card.QUESTIONS", (("Hello", "And now?"),))
    monkeypatch.setattr("flashinfer_cli.apps.tuned_card.SAMPLE_TOKENS", 8)
    assert main.run([*arguments, "--steps", "1", "--batch", "1", "--threads", "1", "--note", "My rows (CC0)."]) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["tuning"]["rows"] == 80 and card["tuning"]["rows_held_out"] == 4
    assert set(card["tuning"]["after"]["nats_by_source"]) == {"a", "b"}
    assert [turn["asked"] for turn in card["samples"][0]] == ["Hello", "And now?"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "My rows (CC0)." in page and "Question" not in page and "**Stop token**" in page
