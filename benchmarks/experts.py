"""Figures of 2312.17238 on our models: what routing gives a cache to find, what guesses find, and what each part earns.

    python -m benchmarks.experts routing MODEL TEXT... [--tokens N] [--out FOLDER]
    python -m benchmarks.experts bias MODEL TEXT... [--rule gap] [--memory SIZE | --slots N] [--tokens N]
    python -m benchmarks.experts degrade BUNDLE TEXT... [--memory SIZE | --slots N] [--tokens N]
    python -m benchmarks.experts ahead BUNDLE TEXT... [--tokens N]
    python -m benchmarks.experts ablation MODEL [--caps 0.5 0.25] [--tokens N]
    python -m benchmarks.experts      ahead, routing and bias of zoo:stories-moe over its held-out stories

Without arguments a bundle is taught on one half of those stories, and what follows is of the other half.
`routing` feeds held-out text token by token, records it, and replays it: hit ratio against k, recall against lookahead
and number, beside chance. `bias` measures perplexity against misses for cache-aware routing, `degrade` against what is
read where light experts come from small copies. `ahead` calibrates a bundle on the text that is not held out, and says
what trained probes find. `ablation` is the paper's Table 2: everything, without reading ahead, without the cache, and
neither. Every command ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import flashinfer_cli as fc
from flashinfer_cli import engine as engine_module
from flashinfer_cli import zoo
from flashinfer_cli.apps.ahead import calibrate_ahead
from flashinfer_cli.apps.recording import recording
from flashinfer_cli.apps.replay import replay
from flashinfer_cli.apps.replay_page import render
from flashinfer_cli.cli.calibrate import ahead_table
from flashinfer_cli.cli.console import Console
from flashinfer_cli.cli.replay import replay_tables
from flashinfer_cli.config import RunConfig
from flashinfer_cli.training.data import read_documents, split

from .machine import emit
from .peers import MOST, run, weight_bytes

WINDOW = 256  # tokens of a story that are fed
PARTS = {
    "full": {},
    "no pre-load": {"prefetch_experts": "off"},
    "no cache": {"expert_policy": "none"},
    "naive": {"expert_policy": "none", "prefetch_experts": "off"},
}


@contextmanager
def with_slots(slots: int | None, transit: int = 3) -> Iterator[None]:
    """Load models with so many expert slots in place of what the budget gives: for models too small to cap."""
    made = engine_module.make_plan

    def changed(*args: Any, **kwargs: Any) -> Any:
        plan = made(*args, **kwargs)
        if slots is None:
            return plan
        return replace(plan, expert_slots=slots, transit_experts=transit, streamed_bytes=max(1, plan.streamed_bytes))

    engine_module.make_plan = changed
    try:
        yield
    finally:
        engine_module.make_plan = made


def parted(texts: list[Path]) -> tuple[list[str], list[str]]:
    """(to teach a bundle on, held out). Of the packaged stories, all of which the models were never shown, halves."""
    stories = read_documents(texts)
    return (stories[::2], stories[1::2]) if [*map(Path.resolve, texts)] == [zoo.HELD_OUT] else split(stories)


def held_out(engine: fc.Engine, texts: list[Path], tokens: int) -> Iterator[list[int]]:
    """Held-out stories as ids, at most WINDOW each, together about `tokens`."""
    stories = parted(texts)[1]
    random.Random(0).shuffle(stories)
    for story in stories:
        if tokens <= 0:
            return
        ids = engine.tokenizer.encode(story)[: min(WINDOW, tokens + 1)]
        if len(ids) > 1:
            tokens -= len(ids) - 1
            yield ids


def feed(engine: fc.Engine, texts: list[Path], tokens: int) -> float:
    """Stories one after the other, each token by token, the cache staying as it is; returns the mean loss in nats."""
    loss, count = 0.0, 0
    for ids in held_out(engine, texts, tokens):
        session = engine.session()
        logits = session.prefill(ids[:1], more=True)
        for index, token in enumerate(ids[1:], 1):
            loss -= float(torch.log_softmax(logits.float(), -1)[token])
            count += 1
            logits = session.step(token, more=index + 1 < len(ids))
        engine.decoder.rt.feed.end()
    return loss / count


def routing(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    trace = given.out / "experts.jsonl.gz"
    with with_slots(given.slots), fc.load(given.model, context=WINDOW, memory=given.memory) as engine:
        with recording(engine, trace):
            loss = feed(engine, given.texts, given.tokens)
        name = engine.model.describe()["name"]
    found = replay(trace)
    (given.out / "experts.html").write_text(render(found))
    (given.out / "experts.json").write_text(json.dumps(found | {"loss": loss, "model": name}))
    Console().show(replay_tables(found))
    emit("experts routing", found["points"], model=name, loss=loss, recall=found["recall"])


def bias(given: argparse.Namespace) -> None:
    print(f"{given.rule:>6} {'keep':>4} {'perplexity':>10} {'change':>8} {'misses':>7} {'a token':>9}")
    first, rows = 0.0, []
    strengths = given.strengths or ([0.1, 0.2, 0.4, 0.8, 1.6] if given.rule == "bias" else [0.1, 0.2, 0.3])
    for strength, keep in ((0.0, 1), *((s, k) for k in given.keep for s in strengths)):
        options = {f"cache_{given.rule}": strength, "keep_top": keep, "prefetch_experts": "off"}
        options["expert_policy"] = given.policy
        with with_slots(given.slots), fc.load(given.model, context=WINDOW, memory=given.memory, **options) as engine:
            perplexity = float(torch.tensor(feed(engine, given.texts, given.tokens)).exp())
            policy = engine.experts.policy
            misses, hits = policy.misses(), policy.hits()
            tokens = engine.report().decode.tokens
        first = first or perplexity
        missed = f"{misses / (misses + hits):>7.1%} {misses / tokens:>9.2f}"
        print(f"{strength:>6} {keep:>4} {perplexity:>10.3f} {perplexity / first - 1:>+8.2%} {missed}", flush=True)
        rows.append({given.rule: strength, "keep": keep, "perplexity": perplexity, "misses_a_token": misses / tokens})
    emit("experts bias", rows, model=given.model, slots=given.slots)


def degrade(given: argparse.Namespace) -> None:
    print(f"{'share':>6} {'perplexity':>10} {'change':>8} {'misses':>7} {'small':>6}  a token; {'read':>9}")
    first, rows = 0.0, []
    for share in (0.0, 0.2, 0.3, 0.4, 0.5, 1.0):
        options = {"degrade": share, "prefetch_experts": "off"}
        with with_slots(given.slots), fc.load(given.model, context=WINDOW, memory=given.memory, **options) as engine:
            perplexity = float(torch.tensor(feed(engine, given.texts, given.tokens)).exp())
            report, cache = engine.report(), engine.experts
            tokens, misses = report.decode.tokens, cache.policy.misses()
            small = sum(row["degraded"] for row in report.experts if row["phase"] == "decode")
            spans = cache.spans[cache.first_layer]
            read = (misses * spans[0].nbytes + small * spans[-1].nbytes) / tokens
        first = first or perplexity
        change = perplexity / first - 1
        counts = f"{misses / tokens:>7.2f} {small / tokens:>6.2f}"
        print(f"{share:>6} {perplexity:>10.3f} {change:>+8.2%} {counts} {read / 1e3:>15.1f} KB", flush=True)
        rows.append({"degrade": share, "perplexity": perplexity, "misses_a_token": misses / tokens,
                     "small_a_token": small / tokens, "bytes_a_token": read})  # fmt: skip
    emit("experts degrade", rows, model=given.model, slots=given.slots)


def ahead(given: argparse.Namespace) -> None:
    found = calibrate_ahead(given.model, "\n".join(parted(given.texts)[0]), RunConfig(), tokens=given.tokens)
    Console().show([ahead_table(found)])
    emit("experts ahead", [vars(pair) for pair in found.pairs], model=given.model, tokens=found.tokens)


def ablation(given: argparse.Namespace) -> None:
    """Each part in a process and a memory cgroup of its own, cold: what one leaves behind is not the next one's."""
    model, rows = Path(given.model), []
    for share in given.caps:
        cap = int(share * weight_bytes(model))
        print(
            f"{model.name}, cap {cap / 1e9:.2f} GB\n{'':12} {'tok/s':>7} {'MB a token':>10} {'hits':>6} {'waiting':>8}"
        )
        for name, options in PARTS.items():
            got = run("ours", sys.executable, model, cap, given.tokens, 16, None, MOST, options)
            rate = f"{got['tok_s']:>7.2f} {got['bytes_per_token'] / 1e6:>10.1f}"
            print(f"{name:12} {rate} {got['hit_ratio']:>6.0%} {got['wait_share']:>8.0%}", flush=True)
            rows.append({"parts": name, "cap": cap, "share": share, **got})
    emit("experts ablation", rows, model=model.name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for call in (routing, bias, degrade, ahead, ablation):
        command = commands.add_parser(call.__name__)
        command.set_defaults(call=call)
        command.add_argument("model")
        if call is not ablation:
            command.add_argument("texts", nargs="+", type=Path, metavar="TEXT")
        command.add_argument("--memory")
        command.add_argument("--slots", type=int, help="experts that stay, whatever the budget")
        command.add_argument("--tokens", type=int, default=24 if call is ablation else 4000)
        if call is ablation:
            command.add_argument("--caps", nargs="+", type=float, default=[0.5, 0.25], help="shares of the weights")
        if call is bias:
            command.add_argument("--rule", choices=["bias", "gap"], default="bias", help="--cache-bias or --cache-gap")
            command.add_argument("--strengths", nargs="*", type=float)
            command.add_argument("--keep", nargs="*", type=int, default=[1, 2])
            command.add_argument("--policy", default="auto", help="--expert-policy")
        if call is routing:
            command.add_argument("--out", type=Path, default=Path("experts"))
    if not (sys.argv[1:] if arguments is None else arguments):
        with tempfile.TemporaryDirectory() as scratch:
            bundle = str(fc.bundle("zoo:stories-moe", Path(scratch) / "stories-moe"))
            main(["ahead", bundle, str(zoo.HELD_OUT), "--tokens", "20000"])
            main(["routing", bundle, str(zoo.HELD_OUT), "--slots", "16"])
            main(["bias", bundle, str(zoo.HELD_OUT), "--slots", "32", "--rule", "gap", "--keep", "1"])
        return
    given = parser.parse_args(arguments)
    given.call(given)


if __name__ == "__main__":
    main()
