"""Each neuron beside a copy of its closest friend (2312.11514, 3.2), which the paper found to lose; and a hot set.

    python -m benchmarks.papers flash-friends [BUNDLE | --trace FILE] [--tokens N] [--shares S...] [--policies NAME...]

BUNDLE is calibrated; without one, the zoo's ReLU model is bundled and calibrated first. Tokens of a text are given to
it one by one and what its predictors name is traced; FILE is such a trace (`genai-run profile --trace`). Friends, the
order of coactivation and the hot set are learned on its first half; the second half runs through the policies, in the
same memory for every row:

    plain          a record is a neuron
    by order       the same, neurons that fire together side by side (`bundle --order coactivation`), nothing twice
    friends        a record is a neuron and a copy of its friend; what is missing comes in the fewest records, and
                   copies stay as though they had been asked for
    in passing     the same; a copy serves the token that read it, and stays only if it asked for it
    by Jaccard     friends, but by how often both fire over how often either does, so that nobody is everybody's friend

Times are by a drive that wants --request microseconds a read and gives --rate bytes a second, for neurons of the
model's own width and of each of --widths; in brackets as if no two records ever came in one read. A second table has
policies with part of the slots for the most frequent, for good.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps.calibrate import calibrate
from flashinfer_cli.apps.recording import recording
from flashinfer_cli.apps.text import read_text
from flashinfer_cli.bundles.order import chain
from flashinfer_cli.cache.trace import Demand, Trace, read_trace
from flashinfer_cli.cache.window import NeuronPolicy, Recent, Window, deal, make_policy
from flashinfer_cli.cli.console import Console
from flashinfer_cli.cli.tables import Table
from flashinfer_cli.config import NEURON_POLICIES, RunConfig

from .flash_ladder import token_ids
from .friends import Counts, Layout, friends, judge, pinned
from .machine import emit

LONGEST, PROMPT = 512, 16  # tokens of a sequence, and of them those not decoded
WARM = 64  # tokens that only fill the slots
HOT = (0.25, 0.5, 0.75)  # of the slots


def traced(bundle: Path, given: argparse.Namespace, file: Path) -> None:
    """Run the model over a text, sequence by sequence, and write what its tokens demand."""
    ids = token_ids(given, bundle, given.tokens)
    with fc.load(bundle, context=LONGEST) as engine, recording(engine, file):
        for begin in range(0, len(ids) - PROMPT, LONGEST):
            part, session = ids[begin : begin + LONGEST], engine.session()
            session.prefill(part[:PROMPT], more=True)
            for place in range(PROMPT, len(part)):
                session.step(part[place], more=place + 1 < len(part))
        engine.decoder.rt.feed.end()


class Halves:
    """A trace's decoded tokens: what is learned from the first half, and the demands of the second."""

    def __init__(self, trace: Trace) -> None:
        decoded = [each for each in trace.demands if each.phase == "decode"]
        learned, self.judged = decoded[: len(decoded) // 2], decoded[len(decoded) // 2 :]
        self.records = trace.records
        self.wants = {int(layer): float(share) for layer, share in trace.about.get("wants", {}).items()}
        self.width = max(trace.record_bytes.values())
        self.tokens = len(self.judged) / len(trace.records) - WARM
        self.sets = {layer: self._of(learned, layer) for layer in trace.records}
        often = {
            layer: np.bincount(np.concatenate(sets), minlength=trace.records[layer])
            for layer, sets in self.sets.items()
        }
        self.by_use = {layer: np.argsort(-counts, kind="stable") for layer, counts in often.items()}

    @staticmethod
    def _of(demands: list[Demand], layer: int) -> list[np.ndarray]:
        return [row[row >= 0] for each in demands if each.layer == layer for row in each.chosen]

    def friends(self, relative: bool = False) -> dict[int, np.ndarray]:
        return {layer: friends(sets, self.records[layer], relative=relative) for layer, sets in self.sets.items()}

    def layouts(self) -> list[Layout]:
        ordered = {layer: np.argsort(chain(sets, self.records[layer])) for layer, sets in self.sets.items()}
        closest = self.friends()
        return [
            Layout("plain"),
            Layout("by order", place=ordered),
            Layout("friends", friend=closest, keep=True),
            Layout("in passing", friend=closest),
            Layout("by Jaccard", friend=self.friends(relative=True), keep=True),
        ]

    def room(self, share: float) -> dict[int, int]:
        """Slots by layer, that share of all neurons, dealt by need as runs do it."""
        slots = round(share * sum(self.records.values()))
        return deal(slots, self.records, dict.fromkeys(self.records, 1), self.wants)

    def run(self, layout: Layout, make: Callable[[int, int, int], NeuronPolicy], share: float, widths: Any) -> Counts:
        room = self.room(share)
        policies = {layer: make(layer, count, room[layer]) for layer, count in self.records.items()}
        return judge(self.judged, layout, policies, widths, WARM * len(self.records))

    def popularity(self, friend: dict[int, np.ndarray]) -> dict[str, float]:
        """Over the layers: how many neurons the most popular one is the friend of, and how many are anybody's, as
        shares of those that have one; and how often a demanded neuron's friend is demanded with it."""
        found = []
        for layer, each in friend.items():
            has = each != np.arange(len(each))
            counts = Counter(each[has].tolist())
            together = asked = 0
            for ids in self._of(self.judged, layer):
                together += int(np.isin(each[ids[has[ids]]], ids).sum())
                asked += len(ids)
            found.append((max(counts.values(), default=0), len(counts), int(has.sum()), together, asked))
        top, some, all_, together, asked = (np.array(column) for column in zip(*found, strict=True))
        top_shares = top / np.maximum(all_, 1)
        return {
            "most_popular": float(top.sum() / all_.sum()), "most_popular_of_a_layer": float(top_shares.max()),
            "anybodys": float(some.sum() / all_.sum()), "with_friend": float(together.sum() / asked.sum()),
        }  # fmt: skip


def row_of(
    found: Counts, layout: Layout, tokens: float, widths: list[int], request: float, rate: float
) -> dict[str, Any]:
    """Counts a token, shares, and times; `one_by_one` are those of a read for each record."""
    own, copies = widths[0], 1 if layout.friend is None else 2
    return {
        "missing": found.missing / found.asked,
        "through_friends": found.through / found.asked,
        "again": found.again / max(1, found.records),
        "records": found.records / tokens,
        "reads": found.reads[own] / tokens,
        "bytes": found.bytes[own] / tokens,
        "us": {width: 1e6 * found.seconds(width, request, rate) / tokens for width in widths},
        "one_by_one": {width: 1e6 * found.records * (request + copies * width / rate) / tokens for width in widths},
        "reads_by_width": {width: found.reads[width] / tokens for width in widths},
        "bytes_by_width": {width: found.bytes[width] / tokens for width in widths},
    }


def hot_sets(halves: Halves, share: float, widths: list[int]) -> list[tuple[str, Counts]]:
    """Window and recency, with and without slots for the most frequent; and the other policies."""
    window, found = RunConfig.window, []

    def make(name: str, part: float) -> Callable[[int, int, int], NeuronPolicy]:
        def made(layer: int, count: int, slots: int) -> NeuronPolicy:
            kind = (lambda: Window(count, slots, window)) if name == "window" else (lambda: Recent(count, slots))
            return pinned(kind, halves.by_use[layer][: int(part * slots)])

        return made

    for name in ("window", "recent"):
        for part in (0.0, *HOT):
            label = f"{name} of {window}" if name == "window" else name
            label += f", {part:.0%} pinned" if part else ""
            found.append((label, halves.run(Layout(label), make(name, part), share, widths)))
    for name in ("frequent", "foresight"):

        def plain(layer: int, count: int, slots: int, name: str = name) -> NeuronPolicy:
            return make_policy(name, count, slots, window)

        found.append((name, halves.run(Layout(name), plain, share, widths)))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="calibrated; default: the zoo's ReLU model")
    parser.add_argument("--trace", type=Path, help="of neurons; instead of a bundle")
    parser.add_argument("--tokens", type=int, default=6000, help="of the text, both halves")
    parser.add_argument("--text", type=Path, help="default: held-out stories")
    parser.add_argument("--random", action="store_true", help="random ids instead of a text")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.375], help="of neurons in slots")
    parser.add_argument("--policies", nargs="+", default=["window", "foresight"], choices=NEURON_POLICIES)
    parser.add_argument("--widths", type=int, nargs="+", default=[8192, 24576], help="bytes of a neuron, also judged")
    parser.add_argument("--request", type=float, default=10, help="microseconds of the drive a read")
    parser.add_argument("--rate", type=float, default=2.3e9, help="bytes of the drive a second")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        bundle, file = given.bundle, given.trace or Path(scratch) / "trace.jsonl.gz"
        if given.trace is None:
            if bundle is None:
                bundle = fc.bundle(zoo.path_of("stories-relu"), Path(scratch) / "stories-relu")
                calibrate(bundle, read_text(zoo.HELD_OUT), RunConfig())
            traced(bundle, given, file)
        trace = read_trace(file)
    if trace.kind != "neurons":
        raise SystemExit(f"{file} is a trace of experts.")
    halves = Halves(trace)
    widths, request = [halves.width, *given.widths], given.request / 1e6
    rows: list[dict[str, Any]] = []
    cells, kept = [], []
    for share in given.shares:
        for name in given.policies:

            def make(layer: int, count: int, slots: int, name: str = name) -> NeuronPolicy:
                return make_policy(name, count, slots, RunConfig.window)

            for layout in halves.layouts():
                found = halves.run(layout, make, share, widths)
                row = row_of(found, layout, halves.tokens, widths, request, given.rate)
                rows.append({"slots": share, "policy": name, "layout": layout.name} | row)
                times = (f"{row['us'][width]:.0f} ({row['one_by_one'][width]:.0f})" for width in widths)
                cells.append(
                    (
                        f"{share:.1%}", name, layout.name, f"{row['missing']:.1%}", f"{row['through_friends']:.1%}",
                        f"{row['again']:.0%}" if layout.friend else "", f"{row['records']:.1f}", f"{row['reads']:.1f}",
                        f"{row['bytes'] / 1e3:.0f}", *times,
                    )
                )  # fmt: skip
        for label, counts in hot_sets(halves, share, widths):
            row = row_of(counts, Layout(label), halves.tokens, widths, request, given.rate)
            rows.append({"slots": share, "policy": label, "layout": "plain"} | row)
            kept.append((f"{share:.1%}", label, f"{row['missing']:.1%}", f"{row['records']:.1f}"))
    popular = {name: halves.popularity(halves.friends(name == "jaccard")) for name in ("closest", "jaccard")}
    notes = tuple(
        f"{name}: the most popular neuron is the friend of {each['most_popular']:.1%} (of one layer's, up to "
        f"{each['most_popular_of_a_layer']:.1%}), {each['anybodys']:.1%} are anybody's; a demanded neuron's friend is "
        f"demanded with it {each['with_friend']:.1%} of the time."
        for name, each in popular.items()
    )
    columns = (
        "slots", "policy", "layout", "missing", "by friends", "copies here already", "records", "reads", "kB",
        *(f"us at {width} B" for width in widths),
    )  # fmt: skip
    name = Path(str(trace.about.get("model", file))).name
    title = f"{name}, {halves.tokens:.0f} tokens, a token; records of {halves.width} B"
    Console().show(
        [
            Table(title, columns, cells, notes),
            Table("A hot set that stays", ("slots", "policy", "missing", "records"), kept),
        ]
    )
    emit("flash-friends", rows, model=name, friends=popular, request_us=given.request, rate=given.rate)


if __name__ == "__main__":
    main()
