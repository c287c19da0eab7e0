"""RoPE as GGUF metadata and its small tensors describe it, in the words of a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedModelError
from .base import TensorInfo
from .files import quoted
from .gguf_keys import Keys
from .rows import read_floats


def make_rope(keys: Keys, tensors: Mapping[str, TensorInfo], head_dim: int) -> dict[str, Any]:
    """The RoPE keys of a config.json, and those that gguf_config.py describes.

    Reads the small tensors of factors. Raises UnsupportedModelError for another kind of scaling, CorruptCheckpointError
    for factors that cannot be.
    """
    made: dict[str, Any] = {
        "rope_theta": keys.real("rope.freq_base") or 10_000.0,
        "rotary_dim": keys.size("rope.dimension_count", head_dim),
    }
    if made["rotary_dim"] != head_dim:
        made["partial_rotary_factor"] = made["rotary_dim"] / head_dim
    kind, factor = keys.get("rope.scaling.type"), keys.real("rope.scaling.factor")
    if kind is None and factor is None:
        factor = keys.real("rope.scale_linear")  # before October 2023
    original = keys.get("rope.scaling.original_context_length")
    attention = keys.real("rope.scaling.attn_factor")
    if original:
        made["original_max_position_embeddings"] = original = keys.size("rope.scaling.original_context_length")
    lists = {key: _factors(tensors, f"rope_factors_{key}.weight") for key in ("short", "long")}
    freqs = _factors(tensors, "rope_freqs.weight")
    if freqs:
        made["rope_freqs"] = freqs
    if lists["short"] and lists["long"]:
        made |= {"short_factor": lists["short"], "long_factor": lists["long"]}
        made["rope_scaling"] = {"rope_type": "longrope", "original_max_position_embeddings": original,
                                "attention_factor": attention}  # fmt: skip
    elif kind == "yarn":
        made["rope_scaling"] = _yarn(keys, factor or 1.0, original, attention)
    elif kind in (None, "linear") and factor not in (None, 0.0, 1.0):
        made["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind not in (None, "none", "linear", "longrope"):
        raise UnsupportedModelError(f"{keys.path} has the RoPE scaling {quoted(str(kind))}, which is not supported.")
    return made


def _yarn(keys: Keys, factor: float, original: int | None, attention: float | None) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for ours, key in (("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow")):
        if keys.real(key) is not None:
            scaling[ours] = keys.real(key)
    if attention is None:
        attention = keys.real("rope.scaling.yarn_attn_factor")
    if attention not in (
        None,
        1.0,
    ):  # ggml multiplies YaRN's own factor with it, where transformers replaces that factor
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    multiplier = keys.real("rope.scaling.yarn_log_multiplier")
    if multiplier and keys.arch == "deepseek2":  # a tenth of mscale_all_dim; llama.cpp takes mscale for the same
        scaling |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}
    return scaling


def _factors(tensors: Mapping[str, TensorInfo], name: str) -> list[float] | None:
    info = tensors.get(name)
    if info is None:
        return None
    values = read_floats(info) if info.nbytes <= 1 << 16 else []
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise CorruptCheckpointError(
            f"Tensor '{name}' of {info.path} does not hold RoPE factors: they are above 0 and few."
        )
    return values
