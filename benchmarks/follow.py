"""How often a small instruct model does what it is asked, on rows of examples/instruct_rows.py that it has not seen.

Greedy, each row a conversation of its own, with the turns that it says went before. Beside it what the answers would
score if each belonged to another row of its kind: what is right by accident.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import flashinfer_cli as fc
from flashinfer_cli.config import SamplingParams

from .machine import emit
from .small_runs import table

MOST = 250  # tokens of an answer
Row = dict[str, Any]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def speaks_of(row: Row, answer: str) -> float:
    """Whether a story speaks of all that was asked for, "a cat and a dog" or "a girl named Lily"."""
    asked = re.search(r"about (.+?)(?:, please)?[.?]$", row["instruction"])
    if asked is None:
        return float(len(words(answer)) > 20)
    wanted = [w for w in words(asked[1]) if w not in ("a", "an", "the", "and", "named")]
    return float(all(w in words(answer) for w in wanted))


def uses(row: Row, answer: str) -> float:
    """Whether it is one sentence with the word."""
    wanted = re.search(r"(?:the word '?|about )([a-z]+)", row["instruction"])
    return float(wanted is not None and wanted[1] in words(answer) and len(words(answer)) < 40)


def same(row: Row, answer: str) -> float:
    return float(answer.strip() == row["output"].strip())


def overlap(row: Row, answer: str) -> float:
    """F1 of words, as question answering is judged by."""
    mine, theirs = Counter(words(answer)), Counter(words(row["output"]))
    both = sum((mine & theirs).values())
    return 2 * both / max(1, sum(mine.values()) + sum(theirs.values()))


JUDGES: dict[str, tuple[str, Callable[[Row, str], float]]] = {
    "story": ("speaks of what was asked for", speaks_of),
    "use": ("a sentence with the word", uses),
    "repeat": ("the same sentence", same),
    "name": ("the right name", same),
    "who": ("the right name and kind", same),
    "colour": ("the right colour", same),
    "said": ("the same words", same),
    "greeting": ("the name that was given", same),
    "fairytaleqa": ("F1 of the answer's words", overlap),
}


def answers_nats(engine: fc.Engine, rows: list[Row]) -> float:
    """Nats a token of the rows' answers, their stop tokens included, as the runtime computes them."""
    nats, tokens = 0.0, 0
    stop = engine.tokenizer.eos_token_ids[0]
    for row in rows:
        prompt = engine.tokenizer.encode_chat([{"role": "user", "content": question(row)}])
        answer = [*engine.tokenizer.encode(row["output"].strip(), add_special=False), stop]
        if len(prompt) + len(answer) <= engine.plan.context:
            logits = engine.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
            nats += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            tokens += len(answer)
    return nats / tokens


def question(row: Row) -> str:
    text = f"{row['instruction'].strip()}\n{row['input'].strip()}" if row["input"] else row["instruction"]
    return str(text).strip()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers follow", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="held_out.jsonl of examples/instruct_rows.py")
    parser.add_argument("--loss", action="store_true", help="the loss of all answers as well")
    parser.add_argument("--rows", type=int, default=60, help="the most of a kind")
    given = parser.parse_args(argv)
    rows = [json.loads(line) for line in given.data.read_text(encoding="utf-8").splitlines()]
    found = []
    sampling = SamplingParams(max_tokens=MOST, temperature=0.0)
    with fc.load(given.model, stream="never") as engine:
        nats = answers_nats(engine, rows) if given.loss else None
        for kind, (what, judge) in JUDGES.items():
            asked = [row for row in rows if row["source"] == kind][: given.rows]
            if not asked:
                continue
            answers, stopped = [], 0
            for row in asked:
                chat = engine.chat()
                for earlier, _ in row.get("history", ()):
                    list(chat.send(earlier, sampling))  # its own answers are what it goes on from
                events = list(chat.send(question(row), sampling))
                answers.append("".join(event.text for event in events).strip())
                stopped += events[-1].finish_reason == "stop"
            shifted = answers[1:] + answers[:1]
            found.append({
                "kind": kind, "what counts": what, "rows": len(asked),
                "followed": sum(map(judge, asked, answers)) / len(asked),
                "by accident": sum(map(judge, asked, shifted)) / len(asked),
                "stopped": stopped / len(asked),
            })  # fmt: skip
            print(found[-1], f"{asked[0]['instruction']} -> {answers[0][:200]}", file=sys.stderr, flush=True)
    table(tuple(found[0]), [tuple(row.values()) for row in found])
    if nats is not None:
        print(f"held-out answers: {nats:.4f} nats a token")
    emit("follow", found, model=given.model, answers_nats=nats)
