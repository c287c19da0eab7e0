"""The card of a tuned model: what it was taught, what that brought, and how it answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import SamplingParams

SAMPLE_TOKENS = 250
QUESTIONS = (
    ("Tell me a story about a cat and a ball.",),
    ("Write a sentence with the word 'happy'.", "Repeat this sentence.\nThe dog ran to the big tree."),
    ("What is the girl's name?\nOnce there was a girl named Sara. She liked to swim in the lake.",),
    ("Hello", "What is the capital of Norway?", "What is the opposite of 'happy'?"),
)


def describe(
    found: dict[str, Any],
    out: Path,
    data: Sequence[Path],
    command: str,
    note: str | None,
    hours: float,
    parameters: int,
) -> dict[str, Any]:
    """The card of the folder `out`, whose figures `found` are; samples are made with it."""
    return {
        "name": out.name,
        "about": f"{found['source']}, tuned to answer",
        "parameters": parameters,
        "data": [{"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in data],
        "note": note,
        "command": command,
        "seed": found["seed"],
        "hours": hours,
        "torch": torch.__version__,
        "tuning": found,
        "samples": samples(out),
    }


def samples(model: Path) -> list[list[dict[str, str]]]:
    """Conversations with the folder, through the runtime."""
    from ..loading import load

    params = SamplingParams(max_tokens=SAMPLE_TOKENS, seed=1)
    found = []
    with load(model) as engine:
        for questions in QUESTIONS:
            chat = engine.chat()
            found.append([
                {"asked": asked, "answer": "".join(event.text for event in chat.send(asked, params)).strip()}
                for asked in questions
            ])  # fmt: skip
    return found


def write_card(card: dict[str, Any], out: Path) -> None:
    """card.json for programs, README.md for people."""
    (out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "README.md").write_text(markdown(card), encoding="utf-8")


def markdown(card: dict[str, Any]) -> str:
    """The card as a page. `quantized`, `followed` and `transcript` are shown where the card has them."""
    tuning = card["tuning"]
    before, after = tuning["before"], tuning["after"]
    most = [", ".join(f"{m:.2f}" for m in each["max_over_mean"]) for each in (before, after) if "max_over_mean" in each]
    files = ", ".join(f"`{file['file']}`" for file in card["data"])
    lines = [
        f"# {card['name']}",
        "",
        f"A small language model that answers simple requests: {card['about']}. {card['parameters']:,} parameters.",
        "",
        f"- **Held-out answers**: {before['nats']:.3f} -> {after['nats']:.3f} nats a token, on "
        f"{tuning['rows_held_out']:,} rows that were not learnt.",
        f"- **Stop token**, where an answer ends: {before['stop_probability']:.1%} -> {after['stop_probability']:.1%}, "
        f"likeliest {before['stop_is_likeliest']:.1%} -> {after['stop_is_likeliest']:.1%} of the time.",
        f"- **Data**: {files}; {tuning['rows']:,} rows to learn. {card['note'] or ''}".rstrip(),
        f"- **Tuning**: {tuning['steps']:,} steps of {tuning['batch']} rows of at most {tuning['longest']} tokens, "
        f"learning rate {tuning['learning_rate']:g}, importance {tuning['importance_weight']:g}, load "
        f"{tuning['load_weight']:g}, frozen {tuning['freeze']}, {card['hours']:.2f} hours, seed {card['seed']}, torch "
        f"{card['torch']}.",
        f"- **Command**: `{card['command']}`",
    ]
    if most:
        lines.append(f"- **Expert use**, the busiest over the mean, by layer: {most[0]} -> {most[1]}.")
    if "quantized" in card:
        lines.append(f"- **Quantised**: {card['quantized']}")
    if "nats_by_source" in after:
        lines += ["", "| held-out answers | before | after |", "|---|---|---|"]
        for source, nats in after["nats_by_source"].items():
            lines.append(f"| {source} | {before['nats_by_source'][source]:.3f} | {nats:.3f} |")
    if "followed" in card:
        lines += [
            "",
            "| asked for, greedy | what counts | rows | followed | by accident | stopped |",
            "|---|---|---|---|---|---|",
        ]
        for row in card["followed"]:
            shares = " | ".join(f"{row[key]:.0%}" for key in ("followed", "by accident", "stopped"))
            lines.append(f"| {row['kind']} | {row['what counts']} | {row['rows']} | {shares} |")
    lines += [
        "",
        "## Samples",
        "",
        "Temperature and top-p of generation_config.json, seed 1, what was asked in bold.",
        "",
    ]
    for conversation in card["samples"]:
        for turn in conversation:
            asked, answer = (turn[key].replace("\n", "\n> ") for key in ("asked", "answer"))
            lines += [f"> **{asked}**\n>\n> {answer}", ">"]
        lines[-1] = ""
    if "transcript" in card:
        lines += ["## In a terminal", "", "```", card["transcript"].rstrip(), "```"]
    return "\n".join(lines).rstrip() + "\n"
