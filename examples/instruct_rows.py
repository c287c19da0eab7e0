"""The rows that zoo:stories-moe-instruct was tuned on, made of instruct.jsonl and of stories.

    python examples/instruct_rows.py OUT --instruct instruct.jsonl --stories tinystories_cased.txt ...

Writes OUT/rows.jsonl to learn and OUT/held_out.jsonl to judge by. Requests are made from the stories: what a story
speaks of from its beginning becomes "Tell me a story about ...", and the story is the answer; so are sentences to write
with a word, sentences to repeat, names, colours and words spoken to find in a text, and what comes next. Of
instruct.jsonl there is what a small model can learn: questions on a passage whose answer stands in it, small talk,
opposites and the like; facts are left out. In half of the texts names and colours are others than in the story, so
that reading them pays and knowing stories does not. Stories are split as `train` splits them, other rows as `tune`
does, so that zoo:stories-moe never learnt what is held out either. Everything random is seeded.
"""
# ruff: noqa: SIM905

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from story_requests import Made, Subjects, of_stories

from flashinfer_cli.training.data import read_documents, split
from flashinfer_cli.training.dialogue import Row, split_rows

COPIES = {"chatterbot-corpus": 10, "rasbt-instruction-data": 10, "fairytaleqa": 1}  # how often a row is learnt
PASSES = 3  # over the stories, each with other requests and other sentences
AGAIN = 0.6  # of the stories are told again in a later pass
TALK = re.compile(
    r"\b(hello|hi|hey|good (morning|night|evening)|how are you|thank|thanks|bye|goodbye|your name|who are you|"
    r"nice to meet|are you|do you|joke|what's up)\b",
    re.I,
)
WORDS = re.compile(r"\b(opposite|antonym|synonym|plural|past tense|rhym\w*|another word|uppercase|lowercase)\b", re.I)
SENSITIVE = re.compile(  # what a teller of children's stories had better have no canned opinion on
    r"\b(sex\w*|kill\w*|die|dead|hate|drug\w*|hitler|nazi\w*|suicide|porn\w*|f[u*]ck\w*|shit|damn|hell|stupid|idiot|"
    r"gun|marijuana|rape\w*|hooker|lesbian|gay|god|jew\w*|muslim\w*|terror\w*)\b",
    re.I,
)
ASKING = "what who how why when where do does did are is can could will would which am".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--instruct", type=Path, required=True)
    parser.add_argument("--stories", type=Path, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    train, held = split(read_documents(given.stories))
    subjects = Subjects(train)
    others = list(instructions(given.instruct))
    rows = [Row(f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"], r["output"]) for r in others]
    learnt = {row.question for row in split_rows(rows)[0]}
    parts: dict[bool, list[Made]] = {True: [], False: []}
    for row, made in zip(rows, others, strict=True):
        parts[row.question in learnt].append(made)
    given.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(given.seed)
    learn = [row for row in parts[True] for _ in range(COPIES[row["source"]])]
    for number in range(PASSES):
        made_rows = of_stories(train, subjects, rng)
        learn += [r for r in made_rows if number == 0 or r["source"] != "story" or rng.random() < AGAIN]
    write(given.out / "rows.jsonl", conversations([varied(row, rng) for row in learn], rng))
    few = list(of_stories(held, subjects, rng)) + parts[False]
    rng.shuffle(few)
    write(given.out / "held_out.jsonl", [row for row in few if not row.pop("follows", None)])


def learnable(row: Made) -> bool:
    """Whether it asks for small talk, for words about words, or for what stands in its passage."""
    if row["source"] == "chatterbot-corpus":
        return bool(TALK.search(row["instruction"])) and len(row["output"]) < 90
    if row["source"] == "rasbt-instruction-data":
        asked = f"{row['instruction']} {row['input']}"
        return bool(WORDS.search(asked)) and len(asked) + len(row["output"]) < 200
    return row["source"] == "fairytaleqa" and len(row["output"]) < 50 and row["output"].lower() in row["input"].lower()


def instructions(path: Path) -> Iterator[Made]:
    """Its learnable rows once each, without code and sensitive ones; passages cut to where the answer stands."""
    seen = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = {key: json.loads(line).get(key, "") for key in ("instruction", "input", "output", "source")}
        row["output"] = row["output"].strip().removesuffix(".") if row["source"] == "fairytaleqa" else row["output"]
        key = (row["instruction"], row["input"], row["output"])
        text = " ".join(key)
        if key in seen or "```" in text or not learnable(row):
            continue
        if row["source"] == "chatterbot-corpus" and SENSITIVE.search(text):
            continue
        seen.add(key)
        if row["source"] == "fairytaleqa":
            row["input"] = passage(row["input"], f"{row['output']} {row['instruction']}")
            if row["output"].lower() not in row["input"].lower():
                continue
            row["output"] = sentence_case(row["output"])
        yield row


def passage(text: str, wanted: str, most: int = 240) -> str:
    """The sentences around the one that shares most words with `wanted`, up to `most` characters."""
    parts = re.split(r"(?<=[.!?])\s+", text)
    words = set(re.findall(r"[a-z]{4,}", wanted.lower()))
    best = max(range(len(parts)), key=lambda i: len(words & set(re.findall(r"[a-z]{4,}", parts[i].lower()))))
    first = last = best
    while True:
        grown = False
        for a, b in ((first - 1, last), (first, last + 1)):
            if a >= 0 and b < len(parts) and len(" ".join(parts[a : b + 1])) <= most:
                first, last, grown = a, b, True
        if not grown:
            return " ".join(parts[first : last + 1])


def sentence_case(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?\"'" else ".")


def varied(row: Made, rng: random.Random) -> Made:
    """Half of the small talk with a capital and a mark at its end, as people type it."""
    if row.get("source") not in ("chatterbot-corpus", "rasbt-instruction-data") or rng.random() < 0.4:
        return row
    asked = row["instruction"].strip()
    asked = asked.capitalize() if asked.isupper() else asked[:1].upper() + asked[1:]
    if asked[-1:].isalnum():
        first = asked.split()[0].lower()
        question = first in ASKING
        asked += "?" if question else "."
    elif asked[-1:] in ".?!" and rng.random() < 0.3:
        asked = asked[:-1]
    return row | {"instruction": asked, "output": row["output"][:1].upper() + row["output"][1:]}


def conversations(rows: list[Made], rng: random.Random) -> list[Made]:
    """Rows shuffled; four in ten short ones are put behind others, as later turns of a conversation.

    A question about a story that was just told loses its text and follows the story.
    """
    following, single = [], []
    story: Made | None = None
    for row in rows:
        if row["source"] == "story":
            story = row
        if (
            row.pop("follows", None)
            and story is not None
            and row["input"][:80] == story["output"][:80].replace("\n", " ")
        ):
            following.append({**row, "input": "", "history": [[story["instruction"], story["output"]]]})
        elif row.get("history"):
            following.append(row)
        else:
            single.append(row)
    rng.shuffle(single)
    short = [r for r in single if len(r["instruction"]) + len(r["input"]) + len(r["output"]) < 250]
    done = following + [r for r in single if len(r["instruction"]) + len(r["input"]) + len(r["output"]) >= 250]
    while short:
        turns = [short.pop() for _ in range(min(len(short), rng.choice((1, 1, 1, 2, 3, 4))))]
        if rng.random() < 0.25 and done and "history" not in done[-1]:
            turns.append(done.pop())  # a longer one comes last
        history = [
            [f"{t['instruction']}\n{t['input']}" if t["input"] else t["instruction"], t["output"]] for t in turns
        ]
        done.append(turns[-1] | ({"history": history[:-1]} if len(turns) > 1 else {}))
        if rng.random() < 0.05:
            rng.shuffle(done)
    rng.shuffle(done)
    return done


def write(path: Path, rows: Iterable[Made]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
