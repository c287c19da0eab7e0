"""`genai-run calibrate`: teach a bundle which of its neurons a token needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import zoo
from ..config import RunConfig, format_size
from ..errors import UsageError
from .console import Console
from .options import PROMPT, Json, Quiet, option
from .running import as_json, parse_share
from .tables import Table

MEMORY = (0.5, 0.25)  # of the FFN weights; as apps.ways has them
HEADS = ("read", "time")
TOKENS, STUDY_TOKENS = 10_000, 2_048  # thresholds of a study need no more
RECALL, MOST = 0.98, "1%"
MORE_MISSED = 1.5  # times as much as was allowed: a thin spot
OVER = 3.0  # times what fires: so much named is worth a word
Kind = Literal["neurons", "gated", "experts"]
MODELS: dict[Kind, str] = {
    "neurons": "models whose activation is ReLU or its square",
    "gated": "gated models without zeros",
    "experts": "mixtures of experts",
}

if TYPE_CHECKING:
    from ..apps.ahead import Ahead
    from ..apps.gated import Study
    from ..apps.paying import Reading
    from ..bundles.sparsity import Sparsity


def calibrate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle of a ReLU, gated or MoE model.")],
    text: Annotated[
        Path | None,
        option(PROMPT, "--text FILE", "Text to learn from.", show_default="the stories that come along"),
    ] = None,
    tokens: Annotated[
        int | None,
        option(
            PROMPT,
            "--tokens N",
            "How much of the text.",
            min=1000,
            show_default=f"{TOKENS}, of a gated model without zeros {STUDY_TOKENS}",
        ),
    ] = None,
    recall: Annotated[
        float | None,
        option(
            PROMPT,
            "--recall P",
            "Of a ReLU model: share of the neurons that fire which each predictor must name.",
            min=0.5,
            max=0.9999,
            show_default=str(RECALL),
        ),
    ] = None,
    like: Annotated[
        Path | None,
        option(
            PROMPT,
            "--like BUNDLE",
            "Of a ReLU model: take the predictors of another bundle of it, calibrated; set only their thresholds.",
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        option(
            PROMPT,
            "--max-ppl-increase SHARE",
            "What skipping neurons may cost: silent ones of a ReLU model, small ones of a gated one (SiLU, GELU).",
            show_default=MOST,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        option(None, "--memory SIZE", "Bound on the memory of the whole process.", show_default="auto"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn which neurons a token needs, so that only they are read.

    For models whose activation is ReLU or its square. The model passes once, a layer at a time; predictors and what was
    measured are written into the bundle, which then runs sparse (--exact runs it whole). Interrupted, it goes on when
    started again.

    Of a mixture of experts it is learned to guess the experts of layers to come from a hidden state; where that finds
    more than the layer's router does, runs of the bundle go by it. Only the speed changes.

    Of a gated model with another activation it is measured what skipping small neurons would cost and save, several
    ways, and whether any of them pays; nothing is written.

    Models with another activation and no gate (GELU in phi and falcon), and dense ones whose blocks tokens may skip,
    are refused: of them nothing is measured.
    """
    console = Console(quiet)
    from ..apps.ahead import calibrate_ahead, has_experts
    from ..apps.calibrate import calibrate as learn
    from ..apps.gated import applies, study
    from ..apps.paying import readings
    from ..apps.text import read_text

    kind: Kind = "experts" if has_experts(bundle) else "gated" if applies(bundle) else "neurons"
    applies_to: tuple[tuple[str, object, tuple[Kind, ...]], ...] = (
        ("--recall", recall, ("neurons",)),
        ("--like", like, ("neurons",)),
        ("--max-ppl-increase", max_ppl_increase, ("neurons", "gated")),
    )
    for name, value, kinds in applies_to:
        if value is not None and kind not in kinds:
            raise UsageError(
                f"{name} does not apply to {MODELS[kind]}.", f"Leave it out: it is for {MODELS[kinds[-1]]}."
            )
    most = parse_share(MOST if max_ppl_increase is None else max_ppl_increase, "--max-ppl-increase")
    asked = RECALL if recall is None else recall
    given = read_text(text if text is not None else zoo.HELD_OUT)
    run = replace(RunConfig(), memory=memory)
    if tokens is None:
        tokens = STUDY_TOKENS if kind == "gated" else TOKENS
    answer: dict[str, Any]
    if kind == "experts":
        ahead = calibrate_ahead(bundle, given, run, tokens=tokens, progress=console.progress)
        answer = {"tokens": ahead.tokens, "pairs": [asdict(pair) for pair in ahead.pairs]}
        shown = ahead_table(ahead)
    elif kind == "gated":
        studied = study(bundle, given, run, tokens=tokens, max_increase=most, progress=console.progress)
        answer, shown = studied.to_dict(), study_table(studied)
    else:
        found = learn(
            bundle, given, run, tokens=tokens, recall=asked, like=like, max_increase=most, progress=console.progress
        )
        console.progress(0, 1, "measuring the drive")
        reading = readings(bundle, found)
        answer = asdict(found) | {
            "reading": [each.to_dict() for each in reading],
            "recall_asked": asked,
            "thin": thin(found, asked),
            "over_predicted": over_predicted(found),
        }
        shown = table(found, asked, reading)
    console.clear()
    if json:
        console.answer(as_json(answer))
    else:
        console.show([shown])


def ahead_table(found: Ahead) -> Table:
    """A row a pair of layers: what the router and the probe find ahead, and which of them a run will go by."""
    rows = []
    for pair in found.pairs:
        source = "embedding" if pair.source < 0 else str(pair.source)
        best = "probe" if pair.better else "router"
        cells = (f"{pair.router:.1%}", f"{pair.probe:.1%}", f"{pair.chance:.1%}", best)
        distance = "next token" if pair.source == pair.layer else str(pair.layer - pair.source)
        rows.append((source, str(pair.layer), distance, *cells))
    notes = (
        "Share of the chosen experts among as many guesses, on tokens held out. Guesses change the speed only; those "
        "of the next token say which experts are worth keeping (--expert-policy foresight).",
    )
    columns = ("from", "layer", "ahead", "router", "probe", "chance", "taken")
    return Table(f"Guesses of experts, learned from {found.tokens:,} tokens", columns, rows, notes)


def thin(found: Sparsity, recall: float) -> list[int]:
    """Layers that miss much more than `recall` allows."""
    return [layer.layer for layer in found.layers if 1 - layer.recall > MORE_MISSED * (1 - recall)]


def over_predicted(found: Sparsity) -> list[int]:
    """Layers whose predictor names many times what fires."""
    return [layer.layer for layer in found.layers if layer.predicted > OVER * layer.density]


def table(found: Sparsity, recall: float, reading: Sequence[Reading]) -> Table:
    """A row a layer, what the model pays, and whether that pays on this drive."""
    rows: list[tuple[str, ...]] = []
    for layer in found.layers:
        over = f"{layer.predicted / layer.density:.1f}x" if layer.density else "–"
        rows.append(
            (
                str(layer.layer), f"{1 - layer.density:.1%}", f"{layer.recall:.1%}", f"{layer.precision:.1%}",
                f"{layer.predicted:.1%}", over, f"{layer.new.get('4', 0.0):.1%}", str(layer.rank),
                format_size(layer.bytes),
            )
        )  # fmt: skip
    quality = found.quality
    notes = [
        f"Perplexity {quality['perplexity']:.3f}, dense {quality['dense_perplexity']:.3f} "
        f"({found.perplexity_increase:+.2%}); same first choice for {quality['top1_agreement']:.1%} of tokens."
    ]
    for what, layers in (
        (f"Thin spots, well below the recall of {recall:.4g} asked for", thin(found, recall)),
        (f"Over {OVER:.0f} times what fires is named", over_predicted(found)),
    ):
        if layers:
            notes.append(f"{what}: layer {', '.join(map(str, layers))}.")
    for each in reading:
        verdict = "it pays" if each.pays else "it does not pay: run it with --exact"
        notes.append(
            f"With {each.memory:.0%} of the FFN in memory plain streaming reads {each.plain:.0%} of it a token in "
            f"{1e3 * each.plain_seconds:.3g} ms, the neurons named {each.neurons:.2%} in "
            f"{1e3 * each.neurons_seconds:.3g} ms: {verdict}."
        )
    columns = ("layer", "silent", "recall", "precision", "predicted", "over", "new in 4", "rank", "bytes")
    return Table(f"Calibrated on {found.tokens:,} tokens", columns, rows, tuple(notes))


def study_table(found: Study) -> Table:
    """A row a way of skipping: what it costs, what it reads, and in the notes whether it pays."""
    rows = []
    for way in found.ways:
        change = f"{way.perplexity / found.perplexity - 1:+.1%} ±{way.error:.1%}"
        cells = [way.kind, f"{way.kept:.0%}", f"{way.perplexity:.3f}", change]
        for share in MEMORY:
            read, seconds = way.bytes(share), found.seconds(way, share)
            cells += ["–", "–"] if read is None or seconds is None else [f"{read:.0%}", f"{1e3 * seconds:.0f} ms"]
        rows.append(tuple(cells))
    rates = [found.rate(way, share) / 1e9 for way in found.ways for share in MEMORY if way.bytes(share)]
    notes = [
        f"Thresholds from {found.tokens:,} tokens; perplexity of {found.test_tokens:,} that follow, "
        f"{found.perplexity:.3f} ±{found.error:.1%} with all neurons. ± is one standard error, of a change by pairs.",
        f"Of the FFN ({format_size(found.ffn_bytes)}) so much is read a token, in so much time: neurons at "
        f"{min(rates, default=0):.2f} to {max(rates, default=0):.2f} GB/s, plain streaming at "
        f"{found.slice_rate / 1e9:.2f} GB/s.",
    ]
    for share in MEMORY:
        plain = 1e3 * (found.seconds(None, share) or 0.0)
        where = f"With {share:.0%} of it in memory plain streaming reads {1 - share:.0%} in {plain:.0f} ms"
        if share in found.best:
            kind, density = found.best[share]
            way = next(each for each in found.ways if (each.kind, each.density) == (kind, density))
            seconds = 1e3 * (found.seconds(way, share) or 0.0)
            notes.append(
                f"{where}; {kind} at {density:.0%} would take {seconds:.0f} ms within +{found.max_increase:.0%}. "
                "Runs do not do this yet: the model stays exact."
            )
        else:
            notes.append(f"{where}; no way within +{found.max_increase:.0%} is faster: none pays, stream it plainly.")
    notes.append("bundle --quantize int8 halves what is read, for models of any activation.")
    columns = ("neurons by", "kept", "perplexity", "change", *(f"{what} at {m:.0%}" for m in MEMORY for what in HEADS))
    return Table("What skipping neurons would cost and save", columns, rows, tuple(notes))
