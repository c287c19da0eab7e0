"""The ladder of LLM in a Flash (2312.11514, Table 2): bytes and time a token as its parts come in one by one.

    python -m benchmarks.papers flash-ladder [BUNDLE] [--share 0.5] [--tokens N] [--text FILE | --random] [--window K]
                                             [--kept FOLDER [--prepare]]

BUNDLE is calibrated; without one, the zoo's ReLU model is bundled and calibrated first. Memory for weights is a share
of the model in every row but the first, which keeps nothing:

    naive         every weight is read for every token
    hybrid        half of the model stays, the other half is read for every token
    + predictor   what is not FFN stays; neurons that are predicted are read, each matrix from a file of its own
    + windowing   the rest of the memory keeps the neurons of the last tokens
    + bundling    the parts of a neuron stand together: one read instead of two or three
    + order       neurons that fire together stand together (not in the paper; Ripple, 2410.19274)
    + recent      slots keep what was demanded last, however long ago, instead of a window; not in the paper
    + foresight   slots keep what the predictor came nearest to naming instead; not in the paper
    + ahead       neurons are read on a guess before attention; not in the paper
    + programs    a layer's demand is settled, read and computed with one call; not in the paper

The parts and the reordered bundle are written beside BUNDLE and removed, or stay in --kept for the next call; --prepare
does no more than write them. Reads are direct: nothing is in the page cache. The tokens are given, the same for every
row; bytes are means, times medians over them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import flashinfer_cli as fc
from flashinfer_cli import engine as engine_module
from flashinfer_cli import zoo
from flashinfer_cli.apps.calibrate import calibrate
from flashinfer_cli.apps.text import read_text
from flashinfer_cli.bundles.reorder import reorder
from flashinfer_cli.bundles.sparsity import read_sparsity
from flashinfer_cli.cache.neurons import NeuronCache
from flashinfer_cli.cli.console import Console
from flashinfer_cli.cli.tables import Table
from flashinfer_cli.config import NEURON_BLOCK, RunConfig
from flashinfer_cli.models import build_neurons
from flashinfer_cli.models.open import open_model
from flashinfer_cli.plan import MemoryPlan, Sizes, pin

from .flash_parts import ByCalls, in_parts, take_apart
from .machine import drive_rate, emit

WARM = 8  # decoded tokens that are left out: the slots still fill


@dataclass(frozen=True)
class Row:
    """One rung. `keep` is what stays of the model: nothing, a share of it, the trunk, or the trunk and slots."""

    name: str
    keep: str
    apart: bool = False
    ordered: bool = False
    programs: bool = False
    options: tuple[tuple[str, Any], ...] = ()


LATE = ("prefetch_neurons", False)
WINDOW = (("neuron_policy", "window"), LATE)
RECENT = (("neuron_policy", "recent"), LATE)
NEAREST = ("neuron_policy", "foresight")
ROWS = (
    Row("naive", "nothing", options=(("exact", True),)),
    Row("hybrid", "share", options=(("exact", True),)),
    Row("+ predictor", "trunk", apart=True, options=(LATE,)),
    Row("+ windowing", "slots", apart=True, options=WINDOW),
    Row("+ bundling", "slots", options=WINDOW),
    Row("+ order", "slots", ordered=True, options=WINDOW),
    Row("+ recent", "slots", ordered=True, options=RECENT),
    Row("+ foresight", "slots", ordered=True, options=(NEAREST, LATE)),
    Row("+ ahead", "slots", ordered=True, options=(NEAREST, ("prefetch_neurons", True))),
    Row("+ programs", "slots", ordered=True, programs=True, options=(NEAREST, ("prefetch_neurons", True))),
)


# ------------------------------------------------------------------ one row


@contextmanager
def arranged(row: Row, share: float, predictors: int, cache: type[NeuronCache]) -> Iterator[None]:
    """Load models with the memory that a row says, whatever the budget would be."""
    made, plain = engine_module.make_plan, build_neurons.NeuronCache

    def plan(sizes: Sizes, **given: Any) -> MemoryPlan:
        found = made(sizes, **{**given, "stream": "always"})
        budget = int(share * sum(sizes.slices))
        if row.keep == "nothing":
            return found
        if row.keep == "share":
            return replace(found, pinned=pin(sizes, budget))
        trunk = tuple(not seldom for seldom in sizes.seldom)
        left = budget - predictors - sum(size for size, stays in zip(sizes.slices, trunk, strict=True) if stays)
        if left < 0:
            raise SystemExit(f"a share of {share:.0%} does not hold what is not FFN; --share must be larger")
        return replace(found, pinned=trunk, neuron_bytes=left if row.keep == "slots" else 0, late_bytes=0)

    engine_module.make_plan = plan
    build_neurons.NeuronCache = cache  # type: ignore[misc]
    try:
        yield
    finally:
        engine_module.make_plan = made
        build_neurons.NeuronCache = plain  # type: ignore[misc]


def run(bundle: Path, ids: list[int], prompt: int, row: Row) -> dict[str, Any]:
    """Tokens `ids`, the first `prompt` of them at once; what each of the others cost."""
    with fc.load(bundle, context=len(ids), **dict(row.options)) as engine:
        session = engine.session()
        session.prefill(ids[:prompt], more=True)
        nats, counted = 0.0, 0
        for index in range(prompt, len(ids) - 1):
            if index == prompt + WARM:
                counters = engine.report()
                begun, requests = _neurons(engine), _requests(counters)
            logits = session.step(ids[index], more=index + 2 < len(ids))
            nats -= float(torch.log_softmax(logits.float(), -1)[ids[index + 1]])
            counted += 1
        engine.decoder.rt.feed.end()
        report = engine.report()
        steps = report.steps[WARM:]
        computed, fresh = (now - then for now, then in zip(_neurons(engine), begun, strict=True))
        count = len(steps)
        return {
            "step": row.name,
            "direct_io": report.direct_io,
            "MB_per_token": sum(step.bytes_read for step in steps) / count / 1e6,
            "ms_per_token": 1e3 * median(step.seconds for step in steps),
            "waiting_ms": 1e3 * median(step.wait_seconds for step in steps),
            "requests": (_requests(report) - requests) / count,
            "neurons": computed / count,
            "new_neurons": fresh / count,
            "wasted_MB": report.wasted_bytes / max(1, counted) / 1e6 if row.options and engine.neurons else 0.0,
            "perplexity": float(np.exp(nats / counted)),
        }


def _neurons(engine: fc.Engine) -> tuple[int, int]:
    """(computed, of these not in the slots) while decoding, so far."""
    counts = engine.recorder.neuron_counts
    computed = sum(count for (phase, _), (count, _) in counts.items() if phase == "decode")
    if not isinstance(engine.neurons, NeuronCache):
        return computed, 0
    return computed, sum(layer.policy.misses for layer in engine.neurons.layers.values())


def _requests(report: fc.RunReport) -> int:
    return sum(io["requests"] for io in report.io if io["phase"] == "decode")


# ------------------------------------------------------------------ all of them


def token_ids(given: argparse.Namespace, bundle: Path, count: int) -> list[int]:
    opened = open_model(bundle)
    if given.random:
        draw = random.Random(7)
        known = min(opened.config.vocab_size, opened.tokenizer.vocab_size)
        return [draw.randrange(3, known) for _ in range(count)]
    text = read_text(given.text or zoo.HELD_OUT)
    return opened.tokenizer.encode(text[-len(text) // 4 :])[:count]


def _folder(given: argparse.Namespace) -> AbstractContextManager[str]:
    if given.kept is None:
        return tempfile.TemporaryDirectory(dir=given.bundle.parent if given.bundle else None)
    given.kept.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(given.kept))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="calibrated; default: the zoo's ReLU model")
    parser.add_argument("--share", type=float, help="of the model that memory for weights holds; default 0.5, zoo 0.65")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--text", type=Path, help="default: held-out stories")
    parser.add_argument("--random", action="store_true", help="random ids instead of a text")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--window", type=int, metavar="K", help="tokens that the window spans")
    parser.add_argument("--kept", type=Path, metavar="FOLDER", help="where parts and the reordered bundle stay")
    parser.add_argument("--prepare", action="store_true", help="only write them")
    given = parser.parse_args(arguments)
    if given.share is None:  # of the zoo's model attention and embedding are 41%
        given.share = 0.5 if given.bundle else 0.65
    with _folder(given) as scratch:
        bundle = given.bundle or fc.bundle(zoo.path_of("stories-relu"), Path(scratch) / "stories-relu")
        if read_sparsity(bundle) is None:
            calibrate(bundle, read_text(given.text or zoo.HELD_OUT), RunConfig())
        sparsity = read_sparsity(bundle)
        assert sparsity is not None
        (Path(scratch) / "parts").mkdir(exist_ok=True)
        parted = in_parts(take_apart(bundle, Path(scratch) / "parts"))
        ordered = Path(scratch) / "ordered"
        if not ordered.exists():
            reorder(bundle, ordered)
        if given.prepare:
            return
        ids = token_ids(given, bundle, given.prompt + given.tokens + WARM + 1)
        predictors = sum(layer.bytes for layer in sparsity.layers)
        rows = []
        for row in ROWS:
            if given.rows and row.name not in given.rows:
                continue
            cache = parted if row.apart else NeuronCache if row.programs else ByCalls
            with arranged(row, given.share, predictors, cache):
                options = dict(row.options)
                if options.get("neuron_policy") == "window":
                    options["window"] = given.window
                row = replace(row, options=tuple(options.items()))
                rows.append(run(ordered if row.ordered else bundle, ids, given.prompt, row))
        whole = open_model(bundle).weight_bytes
        drive = drive_rate(max(bundle.glob("*.safetensors"), key=lambda path: path.stat().st_size))
    cells = [
        (
            row["step"], f"{row['MB_per_token']:.2f}", f"{row['requests']:.0f}", f"{row['waiting_ms']:.2f}",
            f"{row['ms_per_token']:.2f}", f"{rows[0]['ms_per_token'] / row['ms_per_token']:.1f}x",
            f"{row['neurons']:.0f}", f"{row['new_neurons']:.0f}", f"{row['perplexity']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("", "MB a token", "reads", "waiting, ms", "ms a token", "faster", "neurons", "new", "perplexity")
    title = f"{bundle.name}, {whole / 1e6:,.0f} MB, {given.share:.0%} of it in memory, blocks of {NEURON_BLOCK}"
    Console().show([Table(title, columns, cells)])
    emit("flash-ladder", rows, model=str(bundle.name), bytes=whole, share=given.share, drive=drive)


if __name__ == "__main__":
    main()
