"""`genai-run calibrate`: teach a bundle which of its neurons a token needs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import zoo
from ..config import RunConfig, format_size
from .console import Console
from .options import PROMPT, Json, Quiet, option
from .running import as_json, parse_share
from .tables import Table

MEMORY = (0.5, 0.25)  # of the FFN weights; as apps.ways has them
HEADS = ("read", "time")
STUDY_TOKENS = 2_048  # thresholds need no more

if TYPE_CHECKING:
    from ..apps.ahead import Ahead
    from ..apps.gated import Study
    from ..bundles.sparsity import Sparsity


def calibrate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle of a ReLU or MoE model.")],
    text: Annotated[
        Path | None,
        option(PROMPT, "--text FILE", "Text to learn from.", show_default="the stories that come along"),
    ] = None,
    tokens: Annotated[int, option(PROMPT, "--tokens N", "How much of the text.", min=1000)] = 10_000,
    recall: Annotated[
        float,
        option(
            PROMPT, "--recall P", "Share of the neurons that fire which each predictor must name.", min=0.5, max=0.9999
        ),
    ] = 0.98,
    like: Annotated[
        Path | None,
        option(
            PROMPT,
            "--like BUNDLE",
            "Take the predictors of a calibrated bundle of the same model; set only their thresholds.",
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str,
        option(
            PROMPT,
            "--max-ppl-increase SHARE",
            "Of a model without zeros (SiLU, GELU): what skipping small neurons may cost.",
        ),
    ] = "1%",
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
    """
    console = Console(quiet)
    from ..apps.ahead import calibrate_ahead, has_experts
    from ..apps.calibrate import calibrate as learn
    from ..apps.calibrate import read_text
    from ..apps.gated import applies, study

    given = read_text(text if text is not None else zoo.HELD_OUT)
    most = parse_share(max_ppl_increase, "--max-ppl-increase")
    if has_experts(bundle):
        ahead = calibrate_ahead(
            bundle, given, replace(RunConfig(), memory=memory), tokens=tokens, progress=console.progress
        )
        console.clear()
        if json:
            console.answer(as_json({"tokens": ahead.tokens, "pairs": [asdict(pair) for pair in ahead.pairs]}))
        else:
            console.show([ahead_table(ahead)])
        return
    if applies(bundle):
        studied = study(
            bundle, given, replace(RunConfig(), memory=memory), tokens=min(tokens, STUDY_TOKENS), max_increase=most,
            progress=console.progress,
        )  # fmt: skip
        console.clear()
        if json:
            console.answer(as_json(studied.to_dict()))
        else:
            console.show([study_table(studied)])
        return
    found = learn(
        bundle, given, replace(RunConfig(), memory=memory), tokens=tokens, recall=recall, like=like,
        progress=console.progress,
    )  # fmt: skip
    console.clear()
    if json:
        console.answer(as_json(asdict(found)))
    else:
        console.show([table(found)])


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


def table(found: Sparsity) -> Table:
    """A row a layer, and what the model pays."""
    rows: list[tuple[str, ...]] = []
    for layer in found.layers:
        over = layer.predicted / layer.density if layer.density else 0.0
        rows.append(
            (
                str(layer.layer), f"{1 - layer.density:.1%}", f"{layer.recall:.1%}", f"{layer.precision:.1%}",
                f"{layer.predicted:.1%}", f"{over:.1f}x", f"{layer.new.get('4', 0.0):.1%}", str(layer.rank),
                format_size(layer.bytes),
            )
        )  # fmt: skip
    quality = found.quality
    notes = [
        f"Perplexity {quality['perplexity']:.3f}, dense {quality['dense_perplexity']:.3f} "
        f"({found.perplexity_increase:+.2%}); same first choice for {quality['top1_agreement']:.1%} of tokens."
    ]
    thin = [str(layer.layer) for layer in found.layers if layer.recall < 0.95]
    if thin:
        notes.append(f"Thin spots, below 95% recall: layer {', '.join(thin)}.")
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
