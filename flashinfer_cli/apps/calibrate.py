"""Teach a bundle which of its neurons a token needs (2312.11514): statistics and predictors, a layer at a time.

The model passes once: a layer's weights are read, all calibration tokens go through it, its predictor is trained on
what the tokens made it do, its weights are dropped. What it takes in memory is one layer and the hidden states of the
tokens. Layers done are kept beside the bundle until all are, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import device
from ..bundles.format import RecordLayout, format_bytes
from ..bundles.publish import writer_lock
from ..bundles.sparsity import (
    PREDICTORS_FILE,
    LayerSparsity,
    Sparsity,
    manifest_digest,
    read_sparsity,
)
from ..config import MiB, RunConfig
from ..engine import Engine
from ..errors import BundleError, UnsupportedModelError, UsageError
from ..kernels.activations import ACTIVATIONS
from ..layers.ffn import RecordFfn
from ..models.decoder import Block
from ..models.open import OpenModel, open_model
from ..models.predictors import named, read
from .layerwise import layer_by_layer
from .partial import STAGES, Partial
from .paying import missed
from .predictors import BATCH, RANKS, cheapest, fit, judged, new_in_window, packed, unpacked
from .quality import SEQUENCE, Demands, Progress, least_to_measure, quality
from .room import refuse_below
from .text import ids_of

TOKENS = 10_000
LEAST_TOKENS = 1_000
LIKE_TOKENS = 1_024  # that thresholds of predictors taken from elsewhere are set on
WINDOWS_OF = (320, 128, 48, 16)  # tokens, in turns: a text's first tokens wake other neurons, and more of them
HELD_SHARE = 0.2  # of the tokens: half to set the threshold, half to judge
WINDOWS = (1, 2, 4, 8)
SPARSE_ACTS = ("relu", "relu2")


def calibrate(
    bundle: str | Path,
    text: str,
    run: RunConfig,
    *,
    tokens: int = TOKENS,
    recall: float = 0.98,
    evaluate_tokens: int = 1_000,
    like: str | Path | None = None,
    max_increase: float = 0.01,
    progress: Progress | None = None,
) -> Sparsity:
    """Write predictors and statistics into a bundle; returns them.

    `like` is a calibrated bundle of the same model, in other formats or this one: its predictors are taken, and only
    their thresholds are set anew, on at most LIKE_TOKENS.
    `recall` is what each predictor must reach on held-out tokens. Where perplexity rises by more than the share
    `max_increase`, thresholds are set anew for a higher one, twice at most; then nothing is written and
    UnsupportedModelError raised, as for what has no zeros to skip (SiLU, GELU). UsageError for too little text.
    """
    opened = open_model(bundle)
    _check(opened)
    if evaluate_tokens < 2:
        raise UsageError(f"{evaluate_tokens} tokens held out cannot be predicted; two can.")
    ids = ids_of(opened, text, LEAST_TOKENS + evaluate_tokens)
    ids, test = ids[:-evaluate_tokens][:tokens], ids[-evaluate_tokens:]
    path = opened.checkpoint.path
    with writer_lock(path):
        taken, learned = ({}, len(ids)) if like is None else _taken(opened, Path(like))
        _check_room(opened, min(len(ids), LIKE_TOKENS) if taken else len(ids), len(test), run)
        for stage in range(STAGES):
            done = _layers(opened, ids[:LIKE_TOKENS] if taken else ids, run, recall, taken, stage, progress)
            taken, file = {}, done.join()  # the run that is measured has its own
            found = Sparsity(manifest_digest(path), learned, tuple(done.layers[i] for i in sorted(done.layers)), {})
            demands = Demands({layer.layer: opened.config.intermediate_size for layer in found.layers}, len(test))
            found = replace(found, quality=quality(path, test, run, progress, demands, found, file))
            if found.perplexity_increase <= max_increase:
                break
            taken, recall = load_file(file), 1 - (1 - recall) / 4
            demands = Demands({}, 0)  # its memory is the next one's
        else:
            raise UnsupportedModelError(
                f"Perplexity rises by {found.perplexity_increase:.2%} even at {found.recall:.2%} recall, and "
                f"{max_increase:.2%} is the most asked for: skipping neurons does not pay for this model.",
                "The bundle is as it was. Allow more with --max-ppl-increase, or stream it plainly.",
            )
        found = replace(found, missed=missed(demands, getattr(opened.checkpoint, "records", {}), found))
        demands.write_order(done.folder, progress)
        done.publish(found)
    return found


def _check(opened: OpenModel) -> None:
    if opened.checkpoint.kind != "bundle":
        raise UsageError(
            f"{opened.name} is no bundle.", "Make one first: genai-run bundle MODEL OUT, then calibrate OUT."
        )
    if opened.config.hidden_act not in SPARSE_ACTS:
        studied = opened.config.gated and opened.config.mod is None
        raise UnsupportedModelError(
            f"The activation '{opened.config.hidden_act}' leaves no neuron at zero, so there is nothing to predict.",
            "genai-run calibrate measures what skipping small ones would cost and save."
            if studied
            else "What skipping small ones would cost is measured of dense models with a gate only; run it as it is.",
        )
    if opened.config.mod is not None or not getattr(opened.checkpoint, "records", {}):
        raise UnsupportedModelError("The bundle has no dense layers of neuron records.")


def _check_room(opened: OpenModel, tokens: int, test_tokens: int, run: RunConfig) -> None:
    """Raises BudgetError where one layer and what is learned of it do not fit beside the process, or what measures it
    when all are learned."""
    config = opened.config
    d, ff = config.hidden_size, config.intermediate_size
    held = int(HELD_SHARE * tokens)
    states = 4 * 2 * tokens * d  # hidden states, and the inputs of one FFN
    layer = 2 * (3 if config.gated else 2) * d * ff + 16 * d * d
    learning = 4 * d * ff + (tokens // 8 + held) * ff + 4 * 6 * d * d + 4 * max(d * ff, 5 * BATCH * ff + 2 * held * ff)
    records: Mapping[int, RecordLayout] = getattr(opened.checkpoint, "records", {})
    rank = min(RANKS[-1], d // 2)
    predictors = len(records) * ((d + ff) * rank * 17 // 16 + 4 * ff)  # in 8 bits
    to_learn = device.resident_bytes() + states + max(layer, learning) + 96 * MiB
    to_measure = least_to_measure(opened, records, run) + predictors + Demands.nbytes(len(records), ff, test_tokens)
    least = max(to_learn, to_measure + 24 * MiB)
    refuse_below(least, tokens, run, fewer=to_learn == least and tokens > LIKE_TOKENS)


def _taken(opened: OpenModel, like: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Predictors of another bundle of the same model, and the tokens they were learned from. Raises UsageError where
    it has none that fit, BundleError where they are damaged."""
    found = read_sparsity(like)
    if found is None:
        raise UsageError(f"{like} is no calibrated bundle.", "Calibrate it first, or leave --like out.")
    records: dict[int, RecordLayout] = getattr(opened.checkpoint, "records", {})
    try:
        predictors = load_file(like / PREDICTORS_FILE)
        shapes = {}
        for layer in found.layers:
            a, b, _ = read(predictors, layer.layer)
            shapes[layer.layer] = a.cols, len(b.rows)
    except (SafetensorError, OSError, OverflowError, KeyError) as error:
        raise BundleError(f"{like / PREDICTORS_FILE} cannot be read: {error}.", "Calibrate it again.") from None
    if shapes != {layer: (opened.config.hidden_size, each.count) for layer, each in records.items()}:
        raise UsageError(f"{like} is not of the same model: its layers have other sizes.")
    return predictors, found.tokens


# ------------------------------------------------------------------ layer by layer


def _layers(
    opened: OpenModel,
    ids: list[int],
    run: RunConfig,
    recall: float,
    taken: Mapping[str, torch.Tensor],
    stage: int,
    progress: Progress | None,
) -> Partial:
    parts, path = _cut(ids), opened.checkpoint.path
    done = Partial(path, f"{manifest_digest(path)} {recall} {ids} {_digest(taken)}", stage)
    # Nothing is pinned: what the budget has beside one layer is for what is learned of it.
    settled = replace(run, exact=True, context=SEQUENCE, prefill_chunk=SEQUENCE, stream="always")
    with Engine(opened, settled) as engine, torch.inference_mode():
        left = [
            i
            for i, block in enumerate(engine.decoder.blocks)
            if isinstance(block.ffn, RecordFfn) and i not in done.layers
        ]

        def gate_of(index: int, block: Block) -> tuple[torch.Tensor, torch.Tensor | None] | None:
            return gate_rows(block.ffn, engine) if isinstance(block.ffn, RecordFfn) and index in left else None

        for index, block, inputs, gate in layer_by_layer(engine, parts, gate_of, progress) if left else ():
            if gate is None or not isinstance(block.ffn, RecordFfn):
                continue
            with torch.inference_mode(False):
                width = block.ffn.parts[0].slice.nbytes // block.ffn.parts[0].rows
                done.keep(*_fit(index, inputs, *gate, engine.config.hidden_act, recall, width, taken))
            del gate  # before the next layer comes
            if index == left[-1]:
                break  # behind it there is nothing to learn
    if not done.layers:
        raise UnsupportedModelError("The bundle has no dense layers of neuron records.")
    return done


def _digest(taken: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(taken):
        found.update(taken[name].numpy())
    return found.hexdigest()


def _cut(ids: list[int]) -> list[list[int]]:
    """The text as windows of WINDOWS_OF tokens in turns; each begins a sequence."""
    parts: list[list[int]] = []
    place = 0
    while place < len(ids):
        size = WINDOWS_OF[len(parts) % len(WINDOWS_OF)]
        parts.append(ids[place : place + size])
        place += size
    return parts


def gate_rows(ffn: RecordFfn, engine: Engine) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows whose product with x says whether a neuron fires, float32 [d_ff, d], and their bias."""
    d, count = engine.config.hidden_size, sum(part.rows for part in ffn.parts)
    width = format_bytes(ffn.format, d)
    with torch.inference_mode(False):
        gate = torch.empty(count, d)
    for part in ffn.parts:
        with engine.decoder.rt.feed.use(part.slice) as data:
            records = data.view(part.rows, -1)[:, :width].contiguous()
            gate[part.start : part.start + part.rows] = engine.kernels.dequantize(records, ffn.format, d)
    bias = ffn.gate_bias if ffn.gated else ffn.up_bias
    return gate, None if bias is None else bias.cpu()


def _fit(
    layer: int,
    x: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    act: str,
    recall: float,
    record_bytes: int,
    taken: Mapping[str, torch.Tensor],
) -> tuple[LayerSparsity, dict[str, torch.Tensor]]:
    """A layer's predictor, and what it does: learned, or with a threshold anew if it is `taken`; x [N, d] its input."""
    bias = None if bias is None else bias.clone()  # out of inference mode
    fired = torch.cat(
        [packed(ACTIVATIONS[act](F.linear(rows, gate, bias)) != 0) for rows in x.split(BATCH)]
    )  # a bit a neuron
    if f"layers.{layer}.a" in taken:  # of before 4 bits
        a, b, offset = (taken[f"layers.{layer}.{part}"].float() for part in ("a", "b", "bias"))
        fitted = cheapest(a, b, offset, x, unpacked(fired, len(gate)), recall, record_bytes)
    elif taken:
        fitted = judged(*read(taken, layer), x, unpacked(fired, len(gate)), recall)
    else:
        fitted = fit(x, fired, gate, bias, recall, max(2, int(HELD_SHARE * len(x))), record_bytes)
    found = LayerSparsity(
        layer,
        fitted.rank,
        fitted.nbytes,
        fitted.density,
        fitted.predicted,
        fitted.recall,
        fitted.precision,
        new_in_window(fitted.fired, WINDOWS),
    )
    return found, named(layer, fitted.a, fitted.b, fitted.bias)
