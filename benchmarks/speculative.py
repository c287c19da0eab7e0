"""Figures of 2211.17192 where weights stream: drafts against plain decoding, each in a memory cgroup, its files cold.

    python -m benchmarks.papers speculative CASE... [--target T] [--draft D] [--share 0.5] [--tokens N]

    zoo    stories-relu with stories-draft, in memory: greedy text of many prompts compared, tokens a pass, speed
    code   --target with --draft on the beginnings of programs
    edit   --target with the text itself as draft (ngram), on a program to be written again with small changes
    mixed  ten prompts of all kinds, `auto`: with --draft, and with ngram
    window stories-relu: where the window of neurons should end behind a run that was checked, replayed
    moe    stories-moe with half of its experts in memory: drafts by stories-draft, by what is resident, by the text

`speedup` is decoding (all tokens behind the first) against decoding without drafts under the same cap, prompt by
prompt and over all. A draft's memory is part of the cap, so plain decoding keeps more of the target.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from . import cgroup, machine
from .peers import MOST, weight_bytes
from .speculative_prompts import CODE, EDIT, MIXED


def decode(engine: Any, prompt: str, tokens: int) -> dict[str, Any]:
    """Greedy tokens of a prompt, and the seconds that those behind the first took."""
    from flashinfer_cli.config import SamplingParams

    ids, begin = [], 0.0
    for event in engine.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)):
        begin = begin or time.perf_counter()
        ids.append(event.token_id)
    return {"ids": ids, "seconds": time.perf_counter() - begin}


def worker(given: dict[str, Any]) -> dict[str, Any]:
    """Load once, and run the prompts with each of `drafts`: "plain" beside whatever the model was loaded with."""
    import flashinfer_cli as fc

    options = {"memory": given["memory"], "context": given["context"]}
    if given["draft"] is not None:
        options |= {"draft": given["draft"], "speculate": given["speculate"]}
    with fc.load(given["model"], **options) as engine:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in given["modes"]}
        speculator = engine.speculator
        for prompt in given["prompts"]:
            for name in given["modes"]:
                engine.speculator = None if name == "plain" else speculator
                runs[name].append(decode(engine, prompt, given["tokens"]))
        engine.speculator = speculator
        report = engine.report()
    return {
        "runs": runs, "speculation": report.speculation, "plan": str(engine.plan), "peak_bytes": report.peak,
        "passes": report.decode.passes, "read_bytes": report.decode.bytes_read,
        "compute_s": report.decode.compute_seconds, "wait_s": report.decode.wait_seconds,
    }  # fmt: skip


def capped(given: dict[str, Any], cap: int | None, cold: list[Path]) -> dict[str, Any]:
    """`worker` in a process of its own, under a cap or with all the memory there is."""
    given = given | {"memory": None if cap is None else int(MOST * cap)}
    command = [sys.executable, "-m", "benchmarks.speculative", "--worker", json.dumps(given)]
    env = {"PYTHONPATH": str(Path(__file__).parents[1])}
    return cgroup.run_capped(command, cap or 1 << 40, cold, env=env, timeout=1800)


def compare(
    case: str, target: str, draft: str | None, prompts: list[str], share: float, tokens: int, speculate: str
) -> dict[str, Any]:
    """One row: plain decoding and drafted, in processes of their own unless one will do (ngram takes no memory)."""
    path = Path(target)
    cap = None if share >= 1 else int(share * weight_bytes(path))
    together = draft == "ngram"
    base = {"model": target, "prompts": prompts, "tokens": tokens, "context": 1024, "speculate": speculate}
    cold = [path for path in (path, Path(draft or "")) if path.is_dir() or path.is_file()]
    drafted = capped(base | {"draft": draft, "modes": ["plain", "drafted"] if together else ["drafted"]}, cap, cold)
    plain = drafted if together else capped(base | {"draft": None, "modes": ["plain"]}, cap, cold)
    pairs = list(zip(plain["runs"]["plain"], drafted["runs"]["drafted"], strict=True))
    made = sum(len(a["ids"]) - 1 for a, _ in pairs)
    row = {
        "case": case, "model": path.name or target, "draft": Path(draft or "none").name, "speculate": speculate,
        "cap": cap, "share": share, "prompts": len(prompts), "tokens": tokens,
        "plain_tok_s": made / sum(a["seconds"] for a, _ in pairs),
        "tok_s": made / sum(b["seconds"] for _, b in pairs),
        "speedups": [a["seconds"] / b["seconds"] for a, b in pairs],
        "same_text": sum(a["ids"] == b["ids"] for a, b in pairs),
        "plan": drafted["plan"], "plain_plan": plain["plan"], "peak_charge": drafted["peak_charge"],
        "compute_s": drafted["compute_s"], "wait_s": drafted["wait_s"], "passes": drafted["passes"],
        "speculation": drafted["speculation"],
    }  # fmt: skip
    row["speedup"] = row["tok_s"] / row["plain_tok_s"]
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    said = row["speculation"]
    each = sorted(row["speedups"])
    worst = f", prompts {each[0]:.2f} / {median(each):.2f} / {each[-1]:.2f}x" if len(each) > 1 else ""
    print(
        f"{row['case']:6} {row['model']} + {row['draft']} ({row['speculate']}): {row['plain_tok_s']:.2f} -> "
        f"{row['tok_s']:.2f} tok/s, {row['speedup']:.2f}x{worst}; {said['acceptance']:.0%} of the drafted stand, "
        f"{said['tokens_per_pass']:.2f} tokens a pass, {said['mean_length']:.1f} drafted, same text "
        f"{row['same_text']}/{row['prompts']}; {row['plan']}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["zoo"], metavar="CASE")
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--share", type=float, default=0.5, help="of the target's weights: the cap; 1 is none")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--speculate", default="auto")
    parser.add_argument("--prompts", type=int, help="take only so many")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        sys.stdout.write(json.dumps(worker(json.loads(given.worker))) + "\n")
        return
    rows = []
    for case in given.cases or ["zoo"]:
        if case == "window":
            from . import speculative_window

            rows += speculative_window.run(given.tokens, given.prompts)
            continue
        if case in ("zoo", "moe"):
            from . import speculative_zoo

            rows += speculative_zoo.run(case, given.tokens, given.prompts)
            continue
        if given.target is None:
            parser.error(f"{case} needs --target")
        prompts, drafts = {
            "code": (CODE, [given.draft]),
            "edit": (EDIT, ["ngram"]),
            "mixed": (MIXED, [given.draft, "ngram"]),
        }[case]
        for draft in drafts:
            if draft is not None:
                some = prompts[: given.prompts]
                rows.append(compare(case, given.target, draft, some, given.share, given.tokens, given.speculate))
    machine.emit("speculative", rows)


if __name__ == "__main__":
    main()
