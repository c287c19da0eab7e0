"""What is in a checkpoint or bundle, from its headers alone."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean
from typing import Any

from ..config import WeightRef
from ..errors import BundleError, TokenizerError
from ..models.open import OpenModel, open_model


def part_of(role: str) -> str:
    """The part of a model a weight role belongs to, as people speak of it."""
    if role in ("embed", "positions", "project_in"):
        return "embeddings"
    if role.startswith(("head", "project_out")):
        return "head"
    if role.startswith("experts."):
        return "experts"
    if role.startswith(("router", "shared_gate", "mod_")):
        return "routers"
    if "norm" in role:
        return "norms"
    return "attention" if role.split(".")[0] in ("q", "k", "v", "qkv", "o") else "ffn"


def inspect_model(model: str, revision: str | None = None) -> dict[str, Any]:
    """Architecture, parameters, bytes by part, formats, tokenizer, chat template, what would stream, and its label."""
    opened = open_model(model, revision=revision)
    parts, streams, stays = _sizes(opened)
    config = opened.config
    described = opened.describe()
    try:
        tokenizer = opened.tokenizer
        text: dict[str, Any] = {
            "tokenizer": f"{tokenizer.vocab_size} tokens",
            "chat_template": tokenizer.has_chat_template,
            "eos_token_ids": list(tokenizer.eos_token_ids),
        }
    except TokenizerError as error:
        text = {"tokenizer": None, "tokenizer_problem": error.message, "chat_template": False}
    return {
        **described,
        **_label(opened),
        "config": {key: value for key, value in asdict(config).items() if value not in (None, (), 0, 0.0)},
        "parts": parts,
        "streams_bytes": streams,
        "always_resident_bytes": stays,
        "kv_bytes_per_token": opened.kv_bytes_per_token,
        **text,
    }


def _label(opened: OpenModel) -> dict[str, Any]:
    """What a run is labelled, and of a calibrated bundle what was measured: `sparsity` is over its layers, with the
    least and most of rank and recall, and the mean shares of neurons that fire (density) and are predicted."""
    found: dict[str, Any] = {"exactness": opened.exactness, "quality": None, "sparsity": None}
    try:
        known = opened.sparsity
    except BundleError as error:
        return found | {"sparsity_problem": error.message}
    if known is None or not known.layers:
        return found
    layers = known.layers
    ranks, recalls = [layer.rank for layer in layers], [layer.recall for layer in layers]
    about = {
        "with_exact": opened.exactness,
        "tokens": known.tokens,
        "layers": len(layers),
        "predictor_bytes": sum(layer.bytes for layer in layers),
        "rank": (min(ranks), max(ranks)),
        "recall": (min(recalls), max(recalls)),
        "density": fmean(layer.density for layer in layers),
        "predicted": fmean(layer.predicted for layer in layers),
    }
    return found | {"exactness": "sparse", "quality": known.measured, "sparsity": about}


def _sizes(opened: OpenModel) -> tuple[dict[str, int], int, int]:
    """Bytes by part, bytes that can stream, bytes that always stay (as float32)."""
    tensors = opened.checkpoint.tensors
    parts: dict[str, int] = {}
    streams = stays = 0
    seen: set[WeightRef] = set()
    for roles in (opened.weights.model, *opened.weights.layers):
        for role, ref in roles.items():
            if ref in seen:
                continue
            seen.add(ref)
            nbytes = tensors[ref.tensor].rows(ref.row, ref.rows).nbytes
            part = part_of(role)
            parts[part] = parts.get(part, 0) + nbytes
            if part in ("norms", "routers") or role.endswith(".bias") or role == "positions":
                stays += 4 * ref.rows * ref.cols
            else:
                streams += nbytes
    for records in getattr(opened.checkpoint, "records", {}).values():
        part, nbytes = "experts" if records.kind == "experts" else "ffn", tensors[records.tensor].nbytes
        parts[part] = parts.get(part, 0) + nbytes
        streams += nbytes
    return dict(sorted(parts.items(), key=lambda item: -item[1])), streams, stays
