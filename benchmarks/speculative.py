"""Figures of 2211.17192 where weights stream: drafts against plain decoding, each in a memory cgroup, its files cold.

    python -m benchmarks.papers speculative CASE... [--target T] [--draft D] [--share 0.5] [--tokens N] [--repeat R]

    zoo    stories-relu with stories-draft, in memory: greedy text of many prompts compared, tokens a pass, speed
    ngram  the zoo's models in memory with the text itself as draft, which ought to cost nothing
    code   --target with --draft on the beginnings of programs
    edit   --target with the text itself as draft (ngram), on a program to be written again with small changes
    mixed  ten prompts of all kinds, `auto`: with --draft, or with ngram
    ids    --target with --draft (ngram, self, ...), one prompt of ids that repeat themselves and one of random ids
    window stories-relu: where the window of neurons should end behind a run that was checked, replayed
    moe    stories-moe with half of its experts in memory: drafts by stories-draft, by what is resident, by the text

`speedup` is decoding (all tokens behind the first) against decoding without drafts under the same cap. A draft's memory
is part of the cap, so plain decoding keeps more of the target: it has a process and a cap of its own, and both
take turns, prompt by prompt and R times each, the one or the other first. Each run starts with no knowledge of
drafts. A prompt's speedup is median by median; `spread` is (slowest - fastest) / median of its plain runs, so a
ratio that is nearer to 1 than that says nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from . import cgroup, machine
from .peers import MOST, weight_bytes
from .speculative_prompts import CODE, EDIT, MIXED

CONTEXT = 1024


def forget(engine: Any) -> None:
    """Let a speculator know as little as that of a new process."""
    from flashinfer_cli.decoding.drafts import ModelDraft
    from flashinfer_cli.decoding.speculative import Speculator

    old = engine.speculator
    if old is None:
        return
    if old.lender is not None and old.lender.lent:
        old.lender.take_back()
    if isinstance(old.draft, ModelDraft):
        old.draft.session.trim(0)
    engine.speculator = Speculator(old.draft, old.name, old.fixed, old.slope, old.width, lender=old.lender)


def decode(engine: Any, prompt: Any, tokens: int) -> dict[str, Any]:
    """Greedy tokens of a prompt, the seconds that those behind the first took, and what drafts did."""
    from flashinfer_cli.config import SamplingParams

    ids, begin = [], 0.0
    for event in engine.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)):
        begin = begin or time.perf_counter()
        ids.append(event.token_id)
    seconds = time.perf_counter() - begin
    said = None if engine.speculator is None else engine.speculator.report()
    return {"ids": ids, "seconds": seconds, "speculation": said}


def worker(given: dict[str, Any]) -> None:
    """Load once; then, a line each, run a prompt, without drafts where the line says `plain`."""
    import flashinfer_cli as fc

    with fc.load(given.pop("model"), context=CONTEXT, **given) as engine:
        for line in sys.stdin:
            asked = json.loads(line)
            before = engine.report().decode
            forget(engine)
            speculator = engine.speculator
            if asked["plain"]:
                engine.speculator = None
            found = decode(engine, asked["prompt"], asked["tokens"])
            engine.speculator = speculator
            after = engine.report().decode
            made = max(1, len(found["ids"]) - 1)
            found["read_a_token"] = (after.bytes_read - before.bytes_read) / made
            found["wait_a_token"] = (after.wait_seconds - before.wait_seconds) / made
            print(json.dumps(found | {"plan": str(engine.plan)}), flush=True)


def compare(case: str, draft: str, prompts: list[tuple[int, Any]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each prompt, and one over all: plain decoding and drafted in turns, in one process where the draft
    takes no memory, else in one each."""
    path, speculate, repeat = Path(given.target), given.speculate, given.repeat
    cap = None if given.share >= 1 else int(given.share * weight_bytes(path))
    memory = None if cap is None else int(MOST * cap)
    cold = [path for path in (path, Path(draft)) if path.exists()]
    with ExitStack() as stack:

        def started(options: dict[str, Any]) -> Any:
            asked = json.dumps({"model": given.target, "memory": memory} | options)
            command = [sys.executable, "-m", "benchmarks.speculative", "--worker", asked]
            return stack.enter_context(cgroup.asked(command, cap or 1 << 40, cold))

        drafting = started({"draft": draft, "speculate": speculate, "draft_tree": given.tree})
        plain = drafting if draft in ("ngram", "self") else started({})
        base = {"case": case, "model": path.name or given.target, "draft": Path(draft).name, "speculate": speculate,
                "cap": cap, "share": given.share, "repeat": repeat, "tree": given.tree}  # fmt: skip
        rows = []
        for number, prompt in prompts:
            runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
            for turn in range(repeat):
                for kind in (True, False) if (turn + number) % 2 == 0 else (False, True):
                    ask = plain if kind else drafting
                    runs[kind].append(ask({"prompt": prompt, "tokens": given.tokens, "plain": kind}))
            rows.append(base | {"prompt": number} | row_of(runs[True], runs[False]))
            show(rows[-1])
    each = sorted(row["speedup"] for row in rows)
    made = sum(row["tokens"] for row in rows)
    over_all = base | {
        "prompts": len(rows), "plain_tok_s": made / sum(row["tokens"] / row["plain_tok_s"] for row in rows),
        "tok_s": made / sum(row["tokens"] / row["tok_s"] for row in rows), "worst": each[0], "median": median(each),
    }  # fmt: skip
    over_all["speedup"] = over_all["tok_s"] / over_all["plain_tok_s"]
    print(
        f"{case} over {len(rows)} prompts: {over_all['speedup']:.2f}x, worst {each[0]:.2f}, median "
        f"{median(each):.2f}, best {each[-1]:.2f}",
        flush=True,
    )
    return [*rows, over_all]


def row_of(plain: list[dict[str, Any]], drafted: list[dict[str, Any]]) -> dict[str, Any]:
    """What runs of one prompt say."""
    before, after = (sorted(run["seconds"] for run in runs) for runs in (plain, drafted))
    made, last = len(plain[0]["ids"]) - 1, drafted[-1]
    return {
        "tokens": made, "plain_tok_s": made / median(before), "tok_s": made / median(after),
        "speedup": median(before) / median(after), "spread": (before[-1] - before[0]) / median(before),
        "drafted_spread": (after[-1] - after[0]) / median(after),
        "pairs": [a["seconds"] / b["seconds"] for a, b in zip(plain, drafted, strict=True)],
        "same_text": all(a["ids"] == plain[0]["ids"] for a in (*plain, *drafted)),
        "plain_read_a_token": plain[-1]["read_a_token"], "read_a_token": last["read_a_token"],
        "plain_wait_a_token": plain[-1]["wait_a_token"], "wait_a_token": last["wait_a_token"],
        "plain_plan": plain[-1]["plan"], "plan": last["plan"], "peak_charge": last["peak_charge"],
        "speculation": last["speculation"],
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    said = row["speculation"]
    print(
        f"{row['case']:6} {row['model']} + {row['draft']} ({row['speculate']}), prompt {row['prompt']}: "
        f"{row['plain_tok_s']:.2f} -> {row['tok_s']:.2f} tok/s, {row['speedup']:.2f}x "
        f"({' '.join(f'{pair:.2f}' for pair in row['pairs'])}; plain spread {row['spread']:.0%}); "
        f"{said['drafted']} drafted, {said['acceptance']:.0%} stand, {said['tokens_per_pass']:.2f} tokens a pass, "
        f"{row['plain_read_a_token'] / 1e6:.0f} -> {row['read_a_token'] / 1e6:.0f} MB read a token, "
        f"{'same text' if row['same_text'] else 'OTHER TEXT'}",
        flush=True,
    )


def of_ids() -> list[list[int]]:
    """Prompts for models of random weights: a phrase again and again, and none."""
    draw = random.Random(1)
    phrase = [draw.randrange(5, 1000) for _ in range(8)]
    return [phrase * 6, [draw.randrange(5, 1000) for _ in range(48)]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["zoo"], metavar="CASE")
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--share", type=float, default=0.5, help="of the target's weights: the cap; 1 is none")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--speculate", default="auto")
    parser.add_argument("--prompts", type=int, help="take only so many")
    parser.add_argument("--only", type=int, nargs="+", help="take only the prompts of these numbers, from 0")
    parser.add_argument("--tree", type=int, default=0, help="places that have a second guess")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each kind, in turns")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        worker(json.loads(given.worker))
        return
    rows = []
    for case in given.cases or ["zoo"]:
        if case == "window":
            from . import speculative_window

            rows += speculative_window.run(given.tokens, given.prompts)
            continue
        if case in ("zoo", "ngram", "moe"):
            from . import speculative_zoo

            rows += speculative_zoo.run(case, given.tokens, given.prompts, given.repeat)
            continue
        if given.target is None:
            parser.error(f"{case} needs --target")
        prompts, drafts = {
            "code": (CODE, [given.draft]),
            "edit": (EDIT, ["ngram"]),
            "mixed": (MIXED, [given.draft] if given.draft else ["ngram"]),
            "ids": (of_ids(), [given.draft or "ngram"]),
        }[case]
        numbered = [*enumerate(prompts)]
        some = [numbered[i] for i in given.only] if given.only else numbered[: given.prompts]
        for draft in drafts:
            rows += compare(case, draft, some, given)
    machine.emit("speculative", rows)


if __name__ == "__main__":
    main()
