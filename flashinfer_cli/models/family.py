"""What one family of models may have different from llama: three kinds of facts, the words and defaults of its
config.json, the flags of its block, and the names of its tensors by role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .names import GGUF_LAYER, LAYER, MODEL, Names


@dataclass(frozen=True)
class Family:
    """One `model_type`. `words` maps our words to the config's keys where they differ; `defaults` go by the latter."""

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    act_means: Mapping[str, str] = field(default_factory=dict)  # activations whose name means another one here

    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    parallel_block: bool = False
    post_norms: bool = False
    qkv_layout: Literal["split", "grouped"] = "split"
    qk_norm: Literal["none", "head", "full"] = "none"
    qk_norm_flag: str | None = None  # the config's key that says whether q and k are normed at all
    scale_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    query_scale: bool = False  # attention is scaled by query_pre_attn_scalar ** -0.5
    attn_softcap: bool = False  # gemma3 names one in its config too, and transformers does not use it
    final_softcap: bool = False

    rotary: bool = True
    partial_rotary: float | None = None  # default partial_rotary_factor; None: the family turns whole heads
    local_rope: bool = False  # sliding layers have a RoPE of their own
    # Which layers the sliding window covers when no `layer_types` says so: none; all; those from max_window_layers on;
    # every second one below max_window_layers; all but every sliding_window_pattern-th.
    window: Literal["none", "all", "upper", "lower_alternate", "pattern"] = "none"
    window_flag: str | None = None  # the config's key that switches the window on

    # Which layers have experts; `after_dense`: all but the first first_k_dense_replace.
    experts: Literal["none", "all", "sparse_step", "after_dense", "optional"] = "none"
    shared_expert: Literal["none", "gated", "counted"] = (
        "none"  # one with a gate, or n_shared_experts of an expert's size
    )
    norm_topk_prob: bool | None = None  # are the chosen weights made to sum to one, whatever the config says
    expert_groups: bool = False  # topk_method, n_group, topk_group and routed_scaling_factor say how experts are chosen
    fused_experts: bool = False  # gate and up in turns, clamped (gpt_oss), in MXFP4 or turned
    sinks: bool = False
    latent_attention: bool = False  # keys and values from one short vector (2405.04434)
    interleaved_rope: bool = False  # safetensors too turn the pairs (2j, 2j+1)
    recurrent: bool = False  # LSTMs, experts between them (1701.06538)
    depth: bool = False  # blocks that tokens may skip (2404.02258)

    model_names: Names = field(default_factory=lambda: MODEL)
    layer_names: Names = field(default_factory=lambda: LAYER)
    gguf_layer_names: Names = field(default_factory=lambda: GGUF_LAYER)
    prefix: str = "model."
    layer_prefix: str = "layers.{i}."

    def key(self, word: str) -> str:
        """The key of config.json for one of our words."""
        return self.words.get(word, word)
