"""The rows that the zoo's instruct model was tuned on: made of stories, and none of what is held out among them."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flashinfer_cli import zoo
from flashinfer_cli.training.data import END, split

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def made_of() -> Iterator[ModuleType]:
    """The example as it is run: its folder comes first in the path."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("instruct_rows")
    sys.path.remove(str(EXAMPLES))


def test_a_passage_is_cut_to_where_the_answer_stands(made_of):
    text = " ".join(f"This is line number {i} of it." for i in range(40)) + " The frog wore a golden crown. It rained."
    found = made_of.passage(text, "a golden crown", most=120)
    assert "golden crown" in found and len(found) <= 120


def test_requests_name_what_the_story_speaks_of(made_of):
    story = (
        "Once there was a frog. The frog saw a cat. The cat was big, so the frog ran. The end was good for the frog."
    )
    subjects = made_of.Subjects([story] * 5)
    assert subjects.of(story) == ["a frog", "a cat"]
    rows = list(made_of.of_stories([story * 2], subjects, random.Random(3)))
    asked = next(row for row in rows if row["source"] == "story")
    assert "frog" in asked["instruction"] and asked["output"] == story * 2
    for row in rows:
        if row["source"] == "repeat":
            assert row["input"] == row["output"]


def test_nothing_held_out_is_learnt_and_the_seed_decides(made_of, tmp_path, monkeypatch):
    stories = [s.strip() for s in zoo.HELD_OUT.read_text().split(END)][:20]  # held out by their hash, so
    learnt = [f"{s} The end was {i}." for i, s in enumerate(stories) if len(s) < 1000]
    (tmp_path / "stories.txt").write_text(END.join(stories + learnt))
    source = "rasbt-instruction-data"
    asked = [f"What is the opposite of '{i}'?" for i in range(99)]
    rows = [{"instruction": a, "input": "", "output": "b", "source": source} for a in asked]
    rows.append({"instruction": "What is the capital of Peru?", "input": "", "output": "Lima.", "source": source})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for out in ("one", "two"):
        given = [str(tmp_path / out), "--instruct", str(tmp_path / "rows.jsonl"), "--stories"]
        monkeypatch.setattr(sys, "argv", ["instruct_rows.py", *given, str(tmp_path / "stories.txt")])
        made_of.main()
    one, two = (
        [(tmp_path / out / name).read_text() for name in ("rows.jsonl", "held_out.jsonl")] for out in ("one", "two")
    )
    assert one == two
    learn, held = ([json.loads(line) for line in text.splitlines()] for text in one)
    kept = split(stories + learnt)[1]
    told = {row["output"] for row in learn if row["source"] == "story"}
    assert told and not told & {s.replace("\n\n", "\n") for s in kept}
    asked = {row["instruction"] for row in learn} | {q for row in learn for q, _ in row.get("history", [])}
    assert not {row["instruction"] for row in held if row["source"] == source} & asked
    assert "What is the opposite of '1'?" in asked and not any("Peru" in question for question in asked)


def test_what_is_asked_of_a_text_stands_in_it(made_of):
    opening = "Once there was a girl named Anna. Anna had a red ball. She saw a dog. "
    story = opening + 'Tom said, "I like your ball." The end was good.'
    subjects = made_of.Subjects([story, story.replace("Anna", "Mia")])
    rng, found = random.Random(1), []
    for _ in range(60):
        found += made_of.of_stories([story], subjects, rng)
    assert {"name", "who", "colour", "said", "greeting", "repeat"} <= {row["source"] for row in found}
    for row in found:
        last = row["output"].rstrip(".!").split()[-1]
        if row["source"] in ("name", "who", "colour"):
            assert last in row["input"]
        if row["source"] == "said":
            assert row["output"] in row["input"]
        if row["source"] == "greeting":
            assert last in row.get("history", [[row["instruction"]]])[0][0] or last in subjects.names
    assert {row["output"] for row in found if row["source"] == "name"} == {
        "The girl's name is Anna.", "The girl's name is Mia.",
    }  # fmt: skip
