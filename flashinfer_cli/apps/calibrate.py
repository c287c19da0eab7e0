"""Teach a bundle which of its neurons a token needs (2312.11514): statistics and predictors, a layer at a time.

The model passes once: a layer's weights are read, all calibration tokens go through it, its predictor is trained on
what the tokens made it do, its weights are dropped. What it takes in memory is one layer and the hidden states of the
tokens. Layers done are kept beside the bundle until all are, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .. import device
from ..bundles.format import format_bytes
from ..bundles.order import chain
from ..bundles.publish import write_atomic, writer_lock
from ..bundles.sparsity import (
    ORDER_FILE,
    PREDICTORS_FILE,
    SPARSITY_FILE,
    LayerSparsity,
    Sparsity,
    manifest_digest,
    sparsity_json,
)
from ..cache.kv import KVCache
from ..config import MiB, RunConfig, format_size
from ..engine import Engine
from ..errors import BudgetError, TokenizerError, UnsupportedModelError, UsageError
from ..kernels.activations import ACTIVATIONS
from ..layers.ffn import RecordFfn
from ..models.decoder import Block
from ..models.open import OpenModel, open_model
from .evaluate import log_probs, windows
from .predictors import BATCH, Whitened, fit, new_in_window

TOKENS = 10_000
LEAST_TOKENS = 1_000
SEQUENCE = 512  # tokens of a window
HELD_SHARE = 0.2  # of the tokens: half to set the threshold, half to judge
RANKS = (16, 32, 64, 128, 256)
MOST_PREDICTED = 2.5  # times what fires: a predictor that names more is given a higher rank
WINDOWS = (1, 2, 4, 8)
SPARSE_ACTS = ("relu", "relu2")
PARTIAL = ".calibration"

Progress = Callable[[int, int, str], None]


def calibrate(
    bundle: str | Path,
    text: str,
    run: RunConfig,
    *,
    tokens: int = TOKENS,
    recall: float = 0.98,
    evaluate_tokens: int = 1_000,
    progress: Progress | None = None,
) -> Sparsity:
    """Write predictors and statistics into a bundle; returns them.

    `recall` is what each predictor must reach on held-out tokens; the rank is the least at which that names at most
    MOST_PREDICTED times the neurons that fire. Raises UnsupportedModelError for what has no zeros to skip (SiLU, GELU),
    UsageError for too little text.
    """
    opened = open_model(bundle)
    _check(opened)
    ids = opened.tokenizer.encode(text)
    if len(ids) < LEAST_TOKENS + evaluate_tokens:
        raise UsageError(
            f"The text is {len(ids):,} tokens; calibration needs {LEAST_TOKENS + evaluate_tokens:,} at least.",
            "Give a longer text with --text.",
        )
    if max(ids) >= opened.config.vocab_size:
        raise TokenizerError(
            f"The tokenizer of {opened.name} makes ids up to {max(ids):,}, and the model knows "
            f"{opened.config.vocab_size:,}: it is another model's.",
            "Make the bundle again from the whole folder of the model.",
        )
    ids, test = ids[:-evaluate_tokens][:tokens], ids[-evaluate_tokens:]
    path = opened.checkpoint.path
    with writer_lock(path):
        layers, predictors = _layers(opened, ids, run, recall, progress)
        (path / SPARSITY_FILE).unlink(missing_ok=True)  # of a calibration before: it goes with its predictors
        save_file(predictors, path / f"{PREDICTORS_FILE}.tmp")
        (path / f"{PREDICTORS_FILE}.tmp").replace(path / PREDICTORS_FILE)
        found = Sparsity(manifest_digest(path), len(ids), tuple(layers), {})
        demands = _Demands({layer.layer: opened.config.intermediate_size for layer in layers})
        found = replace(found, quality=_quality(path, test, run, progress, demands, found))
        demands.write_order(path, progress)
        write_atomic(path / SPARSITY_FILE, sparsity_json(found))  # the last: now the bundle runs sparse
        _forget(path)
    return found


def read_text(path: Path) -> str:
    """The calibration text. Raises UsageError for a file that is missing or no text."""
    try:
        return path.read_text(encoding="utf-8").replace("<|endoftext|>", "\n")
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text.") from None


def _check(opened: OpenModel) -> None:
    if opened.checkpoint.kind != "bundle":
        raise UsageError(
            f"{opened.name} is no bundle.", "Make one first: genai-run bundle MODEL OUT, then calibrate OUT."
        )
    if opened.config.hidden_act not in SPARSE_ACTS:
        raise UnsupportedModelError(
            f"The activation '{opened.config.hidden_act}' leaves no neuron at zero, so there is nothing to predict.",
            "apps.gated.study measures what skipping small ones would bring; plain streaming needs no calibration.",
        )
    if opened.config.mod is not None or not getattr(opened.checkpoint, "records", {}):
        raise UnsupportedModelError("The bundle has no dense layers of neuron records.")


def _check_room(opened: OpenModel, tokens: int, run: RunConfig) -> None:
    """Raises BudgetError where one layer and what is learned of it do not fit beside the process."""
    config = opened.config
    d, ff = config.hidden_size, config.intermediate_size
    held = int(HELD_SHARE * tokens)
    states = 4 * 2 * tokens * d  # hidden states, and the inputs of one FFN
    layer = 2 * (3 if config.gated else 2) * d * ff + 16 * d * d
    learning = 4 * d * ff + tokens * ff + 4 * 6 * d * d + 4 * max(d * ff, 5 * BATCH * ff + 2 * held * ff)
    least = device.resident_bytes() + states + max(layer, learning) + 96 * MiB
    budget = device.budget_bytes(run.memory)
    if budget < least:
        raise BudgetError(
            f"The memory budget of {format_size(budget)} is too small to calibrate on {tokens:,} tokens: "
            f"that takes about {format_size(least)}.",
            f"Give --memory {-(-least // MiB)}MiB or more, or fewer --tokens.",
            least=least,
        )


# ------------------------------------------------------------------ layer by layer


def _layers(
    opened: OpenModel, ids: list[int], run: RunConfig, recall: float, progress: Progress | None
) -> tuple[list[LayerSparsity], dict[str, torch.Tensor]]:
    parts = [ids[i : i + SEQUENCE] for i in range(0, len(ids), SEQUENCE)]
    done = _Partial(opened.checkpoint.path, f"{manifest_digest(opened.checkpoint.path)} {recall} {ids}")
    # Nothing is pinned: what the budget has beside one layer is for what is learned of it.
    settled = replace(run, exact=True, context=SEQUENCE, prefill_chunk=SEQUENCE, stream="always")
    _check_room(opened, len(ids), run)
    with Engine(opened, settled) as engine, torch.inference_mode():
        decoder, rt = engine.decoder, engine.decoder.rt
        kv = KVCache(engine.config, SEQUENCE, engine.device.name)
        states = [decoder.embedding(torch.tensor(w), rt) * engine.config.embedding_scale for w in parts]
        if decoder.positions is not None:
            first = engine.config.position_offset
            states = [x + decoder.positions[first : first + len(x)] for x in states]
        with torch.inference_mode(False):
            inputs = torch.empty(len(ids), engine.config.hidden_size)
        for index, block in enumerate(decoder.blocks):
            if progress is not None:
                progress(index, len(decoder.blocks), f"calibrating layer {index + 1} of {len(decoder.blocks)}")
            with rt.feed.hold(decoder.slices_of(index)):
                watched = _watched(block, inputs)
                for number, x in enumerate(states):
                    kv.trim(0)
                    states[number] = watched(x, kv, len(x), rt)
                if index not in done.layers and isinstance(block.ffn, RecordFfn):
                    gate, gate_bias = _gate(block.ffn, engine)
            if index not in done.layers and isinstance(block.ffn, RecordFfn):
                with torch.inference_mode(False):
                    before = done.layers[index - 1].rank if index - 1 in done.layers else 0
                    done.keep(*_fit(index, inputs, gate, gate_bias, engine.config.hidden_act, recall, before))
                del gate
    if not done.layers:
        raise UnsupportedModelError("The bundle has no dense layers of neuron records.")
    return [done.layers[i] for i in sorted(done.layers)], done.tensors()


def _watched(block: Block, inputs: torch.Tensor) -> Block:
    """The block, with what goes into its FFN noted down in the rows of `inputs` [N, d], one after the other."""
    ffn, place = block.ffn, 0
    assert ffn is not None

    def noting(x: torch.Tensor, rt: Any) -> torch.Tensor:
        nonlocal place
        inputs[place : place + len(x)] = x
        place += len(x)
        return ffn(x, rt)

    return replace(block, ffn=noting)  # type: ignore[arg-type]


def _gate(ffn: RecordFfn, engine: Engine) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    rank_before: int,
) -> tuple[LayerSparsity, dict[str, torch.Tensor]]:
    """A layer's predictor: of the least rank that is good enough, from half of what the layer before needed on."""
    bias = None if bias is None else bias.clone()  # out of inference mode
    fired = torch.empty(len(x), len(gate), dtype=torch.bool)
    for rows, into in zip(x.split(BATCH), fired.split(BATCH), strict=True):
        into.copy_(ACTIVATIONS[act](rows @ gate.T if bias is None else rows @ gate.T + bias) != 0)
    held = max(2, int(HELD_SHARE * len(x)))
    start = Whitened(x[: len(x) - held], gate)
    usable = [rank for rank in RANKS if rank * 2 <= min(gate.shape)] or [RANKS[0]]
    for rank in [rank for rank in usable if rank * 2 >= rank_before] or usable[-1:]:
        fitted = fit(x, fired, start, bias, rank, recall, held)
        if fitted.predicted <= MOST_PREDICTED * fitted.density and fitted.recall >= recall - 0.02:
            break
    found = LayerSparsity(
        layer,
        len(fitted.a),
        fitted.nbytes,
        fitted.density,
        fitted.predicted,
        fitted.recall,
        fitted.precision,
        new_in_window(fitted.fired, WINDOWS),
    )
    names = {"a": fitted.a.half(), "b": fitted.b.half(), "bias": fitted.bias}
    return found, {f"layers.{layer}.{name}": value.contiguous() for name, value in names.items()}


class _Partial:
    """Layers that are done, in a hidden folder beside the bundle, for the same bundle, text and recall only."""

    def __init__(self, bundle: Path, what: str) -> None:
        self.folder = _folder(bundle)
        key = hashlib.sha256(what.encode()).hexdigest()
        if not (self.folder / "key").exists() or (self.folder / "key").read_text() != key:
            _forget(bundle)
            self.folder.mkdir()
            (self.folder / "key").write_text(key)
        self.layers: dict[int, LayerSparsity] = {}
        for file in self.folder.glob("*.json"):
            layer = LayerSparsity(**json.loads(file.read_text()))
            self.layers[layer.layer] = layer

    def keep(self, layer: LayerSparsity, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.folder / f"{layer.layer}.safetensors")
        write_atomic(self.folder / f"{layer.layer}.json", json.dumps(asdict(layer)).encode())
        self.layers[layer.layer] = layer

    def tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for i in self.layers for k, v in load_file(self.folder / f"{i}.safetensors").items()}


def _folder(bundle: Path) -> Path:
    return bundle.with_name(f".{bundle.name}{PARTIAL}")


def _forget(bundle: Path) -> None:
    folder = _folder(bundle)
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


class _Demands:
    """What the tokens of a run demanded of each layer, a bit a neuron."""

    def __init__(self, counts: dict[int, int]) -> None:
        self.counts = counts
        self.tokens: dict[int, list[np.ndarray]] = {layer: [] for layer in counts}

    def demand(self, phase: str, layer: int, chosen: np.ndarray) -> None:
        if phase == "decode":
            demanded = np.zeros(self.counts[layer], bool)
            demanded[chosen[0]] = True
            self.tokens[layer].append(np.packbits(demanded))

    def write_order(self, path: Path, progress: Progress | None) -> None:
        """Which neurons belong side by side, for `reorder`."""
        orders: dict[str, torch.Tensor] = {}
        for layer, count in self.counts.items():
            if progress is not None:
                progress(len(orders), len(self.counts), "finding which neurons fire together")
            tokens = [np.flatnonzero(np.unpackbits(packed, count=count)) for packed in self.tokens[layer]]
            orders[str(layer)] = torch.from_numpy(chain(tokens, count))
        save_file(orders, path / f"{ORDER_FILE}.tmp")
        (path / f"{ORDER_FILE}.tmp").replace(path / ORDER_FILE)


# ------------------------------------------------------------------ what it costs


def _quality(
    path: Path, ids: list[int], run: RunConfig, progress: Progress | None, demands: _Demands, found: Sparsity
) -> dict[str, float]:
    """Perplexity of held-out tokens, computed as at decoding and densely, and how often both have the same choice."""
    sparse, chosen = _score(path, ids, replace(run, exact=False), progress, demands, found)
    dense, wanted = _score(path, ids, replace(run, exact=True), progress)
    return {
        "perplexity": sparse,
        "dense_perplexity": dense,
        "top1_agreement": float((chosen == wanted).float().mean()),
    }


def _score(
    path: Path,
    ids: list[int],
    run: RunConfig,
    progress: Progress | None,
    demands: _Demands | None = None,
    found: Sparsity | None = None,
) -> tuple[float, torch.Tensor]:
    """(perplexity, the first choice at every position) of one run; `demands` takes down what it asks for; `found`
    is not written yet."""
    settled = replace(run, context=SEQUENCE, logit_rows=64, prefill_chunk=64)
    nats, count, chosen = 0.0, 0, []
    what = "measuring it dense" if run.exact else "measuring it sparse"
    opened = open_model(path)
    if found is not None:
        vars(opened)["sparsity"] = found  # as if it had been read
    with Engine(opened, settled) as engine:
        if demands is not None and engine.neurons is not None:
            engine.neurons.trace = demands
        for window in windows(ids, SEQUENCE):
            place = 0
            for lp in log_probs(engine, window):
                targets = torch.tensor(window[place + 1 : place + 1 + len(lp)])
                nats -= float(lp[: len(targets)].gather(1, targets[:, None]).sum())
                count += len(targets)
                place += len(lp)
                chosen.append(lp.argmax(-1))
                if progress is not None:
                    progress(count, len(ids), what)
    return math.exp(nats / count), torch.cat(chosen)
