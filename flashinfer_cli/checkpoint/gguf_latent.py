"""Metadata of deepseek2: latent attention, and experts behind some dense layers, in the words of a config.json.

Files since April 2025 describe attention as llama.cpp computes it, with one key and value head as long as the latent
vector, and keep the lengths of a head in keys of their own; the ones before describe the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModelError
from .base import TensorInfo
from .gguf_keys import Keys

_SOFTMAX = (None, 0, 1)  # files of V2 are silent, or say which


def latent_sizes(keys: Keys) -> dict[str, Any]:
    """The lengths of DeepSeek-V2's vectors. `head_dim` is what RoPE turns, as transformers has it."""
    turned = keys.size("rope.dimension_count")
    lengths = {}
    for part in ("key", "value"):
        own = f"attention.{part}_length_mla"
        lengths[part] = keys.size(own if keys.get(own) else f"attention.{part}_length")
    if lengths["key"] <= turned:
        raise keys.wrong("rope.dimension_count", turned)
    return {
        "head_dim": turned,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": lengths["key"] - turned,
        "v_head_dim": lengths["value"],
        "kv_lora_rank": keys.size("attention.kv_lora_rank"),
        "q_lora_rank": keys.size("attention.q_lora_rank") if keys.get("attention.q_lora_rank") else None,
    }


def latent_experts(keys: Keys, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have experts, and how these are chosen. Raises UnsupportedModelError for what came after V2."""
    _refuse(keys, tensors)
    layers = config["num_hidden_layers"]
    if not keys.get("expert_count"):
        return {"first_k_dense_replace": layers}
    dense = keys.get("leading_dense_block_count") or 0
    if isinstance(dense, bool) or not isinstance(dense, int) or not 0 <= dense <= layers:
        raise keys.wrong("leading_dense_block_count", dense)
    made: dict[str, Any] = {
        "first_k_dense_replace": dense,
        "n_routed_experts": keys.size("expert_count"),
        "num_experts_per_tok": keys.size("expert_used_count"),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "n_shared_experts": keys.size("expert_shared_count") if keys.get("expert_shared_count") else None,
        "routed_scaling_factor": keys.real("expert_weights_scale") or 1.0,
    }
    groups = keys.size("expert_group_count") if keys.get("expert_group_count") else 1
    if groups > 1:
        few = keys.size("expert_group_used_count")
        made |= {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": few}
    return made


def _refuse(keys: Keys, tensors: Mapping[str, TensorInfo]) -> None:
    what = None
    if any(".exp_probs_b" in name for name in tensors):
        what = "routes with a bias for every expert ('exp_probs_b'), as DeepSeek-V3 does"
    elif keys.get("expert_gating_func") not in _SOFTMAX:
        what = f"routes by another function than a softmax ('expert_gating_func' {keys.get('expert_gating_func')})"
    elif keys.get("expert_weights_norm"):
        what = "has the weights of the chosen experts sum to one ('expert_weights_norm')"
    elif keys.real("attention.temperature_scale"):
        what = "scales queries by their positions ('attention.temperature_scale')"
    if what is not None:
        raise UnsupportedModelError(f"{keys.path} {what}, which is not supported.", "Of deepseek2 only V2 is.")
