"""Drafts for the zoo's small models: the pair stories-relu and stories-draft in memory, stories-moe with few slots."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.config import SamplingParams

from .experts import with_slots

PROMPT, CONTEXT = 12, 256  # tokens
MOE_DRAFTS = (("zoo:stories-draft", "4"), ("zoo:stories-draft", "auto"), ("self", "4"), ("self", "auto"),
              ("ngram", "auto"))  # fmt: skip


def prompts(engine: fc.Engine, number: int) -> list[list[int]]:
    """The beginnings of held-out stories, as ids."""
    text = (Path(zoo.__file__).parent / "held_out_stories.txt").read_text()
    ids = engine.tokenizer.encode(text)
    draw = random.Random(3)
    starts = [draw.randrange(0, len(ids) - PROMPT) for _ in range(number)]
    return [ids[start : start + PROMPT] for start in starts]


def timed(engine: fc.Engine, given: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], float]:
    """The tokens that follow each prompt, and the seconds of those behind the first."""
    texts, seconds = [], 0.0
    for prompt in given:
        begin, made = 0.0, []
        for event in engine.generate(prompt, params):
            begin = begin or time.perf_counter()
            made.append(event.token_id)
        seconds += time.perf_counter() - begin
        texts.append(made)
    return texts, seconds


def one(
    case: str, model: str, draft: str, speculate: str, number: int, params: SamplingParams, **options: Any
) -> dict[str, Any]:
    """Plain and drafted in one process, taking turns prompt by prompt, so that a noisy machine is so to both."""
    with (
        fc.load(model, context=CONTEXT, **options) as plain,
        fc.load(model, context=CONTEXT, draft=draft, speculate=speculate, **options) as drafted,
    ):
        same, plain_seconds, seconds, made = 0, 0.0, 0.0, 0
        for prompt in prompts(plain, number):
            (want,), took = timed(plain, [prompt], params)
            plain_seconds += took
            (got,), took = timed(drafted, [prompt], params)
            seconds += took
            same += got == want
            made += len(got) - 1
        before, after = plain.report().decode, drafted.report().decode
        said = drafted.report().speculation
    row = {
        "case": case, "model": model, "draft": draft, "speculate": speculate, "temperature": params.temperature,
        "cap": None, "prompts": number, "tokens": made, "plain_tok_s": made / plain_seconds, "tok_s": made / seconds,
        "speedup": plain_seconds / seconds, "same_text": same if params.temperature == 0 else None,
        "plain_bytes_per_token": before.bytes_per_token, "bytes_per_token": after.bytes_per_token, "speculation": said,
    }  # fmt: skip
    assert said is not None
    print(
        f"{case:4} {model} + {draft} ({speculate}), T {params.temperature}: {row['plain_tok_s']:.1f} -> "
        f"{row['tok_s']:.1f} tok/s, {row['speedup']:.2f}x, alpha {said['alpha']:.2f}, {said['tokens_per_pass']:.2f} "
        f"tokens a pass ({said['expected_tokens_per_pass']:.2f} by the formula), {said['mean_length']:.1f} drafted, "
        f"{before.bytes_per_token / 1e3:.0f} -> {after.bytes_per_token / 1e3:.0f} KB read a token"
        + (f", same text {same}/{number}" if params.temperature == 0 else ""),
        flush=True,
    )
    return row


def run(case: str, tokens: int, number: int | None) -> list[dict[str, Any]]:
    greedy = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
    if case == "zoo":
        pair = ("zoo", "zoo:stories-relu", "zoo:stories-draft")
        wanted = (("1", greedy), ("2", greedy), ("4", greedy), ("8", greedy), ("auto", greedy), ("4", drawn))
        return [one(*pair, speculate, number or 20, params) for speculate, params in wanted]
    rows = []
    with fc.load("zoo:stories-moe", context=CONTEXT) as engine:
        assert engine.experts is not None
        total = engine.experts.policy.total
    for share in (0.5, 0.25):
        with with_slots(int(share * total), transit=8):
            for draft, speculate in MOE_DRAFTS:
                rows.append(one("moe", "zoo:stories-moe", draft, speculate, number or 8, greedy) | {"share": share})
    return rows
