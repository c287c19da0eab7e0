"""Drafts for the zoo's small models: the pair stories-relu and stories-draft in memory, stories-moe with few slots."""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.config import SamplingParams

from .experts import with_slots
from .speculative import forget

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


def timed(engine: fc.Engine, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
    """The tokens that follow a prompt, and the seconds of those behind the first."""
    begin, made = 0.0, []
    for event in engine.generate(prompt, params):
        begin = begin or time.perf_counter()
        made.append(event.token_id)
    return made, time.perf_counter() - begin


def one(
    case: str, model: str, draft: str, speculate: str, number: int, params: SamplingParams, repeat: int, **options: Any
) -> dict[str, Any]:
    """Plain and drafted in one process, taking turns prompt by prompt, the one or the other first, so that a noisy
    machine is so to both; `repeat` rounds over the prompts, whose median is the speedup. No round knows of the others.
    """
    with (
        fc.load(model, context=CONTEXT, **options) as plain,
        fc.load(model, context=CONTEXT, draft=draft, speculate=speculate, **options) as drafted,
    ):
        same, rounds, made = 0, [], 0
        for turn in range(repeat + 1):  # the first, with all that libraries do once, does not count
            forget(drafted)
            seconds = [0.0, 0.0]
            for index, prompt in enumerate(prompts(plain, number)):
                texts: dict[int, list[int]] = {}
                for kind in (0, 1) if (turn + index) % 2 else (1, 0):
                    texts[kind], took = timed((plain, drafted)[kind], prompt, params)
                    seconds[kind] += took
                same += bool(turn) and texts[0] == texts[1]
                made += (len(texts[1]) - 1) * bool(turn)
            if turn:
                rounds.append((seconds[0], seconds[1]))
        before, after = plain.report().decode, drafted.report().decode
        said = drafted.report().speculation
    each = [a / b for a, b in rounds]
    plain_seconds, seconds_ = (median(pair[kind] for pair in rounds) for kind in (0, 1))
    row = {
        "case": case, "model": model, "draft": draft, "speculate": speculate, "temperature": params.temperature,
        "cap": None, "prompts": number, "tokens": made, "repeat": repeat,
        "plain_tok_s": made / repeat / plain_seconds, "tok_s": made / repeat / seconds_,
        "speedup": median(each), "rounds": each, "same_text": same if params.temperature == 0 else None,
        "plain_bytes_per_token": before.bytes_per_token, "bytes_per_token": after.bytes_per_token, "speculation": said,
    }  # fmt: skip
    assert said is not None
    print(
        f"{case:4} {model} + {draft} ({speculate}), T {params.temperature}: {row['plain_tok_s']:.1f} -> "
        f"{row['tok_s']:.1f} tok/s, {row['speedup']:.2f}x ({' '.join(f'{ratio:.2f}' for ratio in each)}), alpha "
        f"{said['alpha']:.2f}, {said['tokens_per_pass']:.2f} tokens a pass "
        f"({said['expected_tokens_per_pass']:.2f} by the formula), {said['mean_length']:.1f} drafted, "
        f"{before.bytes_per_token / 1e3:.0f} -> {after.bytes_per_token / 1e3:.0f} KB read a token"
        + (f", same text {same}/{number * repeat}" if params.temperature == 0 else ""),
        flush=True,
    )
    return row


def run(case: str, tokens: int, number: int | None, repeat: int) -> list[dict[str, Any]]:
    greedy = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
    if case == "zoo":
        pair = ("zoo", "zoo:stories-relu", "zoo:stories-draft")
        wanted = (("1", greedy), ("2", greedy), ("4", greedy), ("8", greedy), ("auto", greedy), ("4", drawn))
        return [one(*pair, speculate, number or 20, params, repeat) for speculate, params in wanted]
    if case == "ngram":
        models = ("zoo:stories-relu", "zoo:stories-moe")
        return [one(case, model, "ngram", "auto", number or 20, greedy, repeat) for model in models]
    rows = []
    with fc.load("zoo:stories-moe", context=CONTEXT) as engine:
        assert engine.experts is not None
        total = engine.experts.policy.total
    for share in (0.5, 0.25):
        with with_slots(int(share * total), transit=8):
            for draft, speculate in MOE_DRAFTS:
                found = one("moe", "zoo:stories-moe", draft, speculate, number or 8, greedy, repeat)
                rows.append(found | {"share": share})
    return rows
