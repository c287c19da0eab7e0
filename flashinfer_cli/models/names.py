"""Names of tensors by role (the roles of `config.WeightMap`): llama's, from which other families differ, and GGUF's.

Names are without `.weight` and without the prefix of the whole model; `{e}` is an expert. Where files have gone by
several names, the alternatives stand side by side. `gate_up` and `all_experts.*` are fused tensors of several roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Names = Mapping[str, tuple[str, ...]]


def renamed(base: Names, **changed: str) -> Names:
    """`base` with some roles renamed: alternatives are separated by spaces, an empty string removes the role."""
    merged = {**base, **{role.replace("__", "."): tuple(text.split()) for role, text in changed.items()}}
    return MappingProxyType({role: names for role, names in merged.items() if names})


MODEL = renamed({}, embed="embed_tokens", final_norm="norm")
LAYER = renamed(
    {},
    attn_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    qkv="self_attn.qkv_proj",
    o="self_attn.o_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    q_a="self_attn.q_a_proj",
    q_a_norm="self_attn.q_a_layernorm",
    q_b="self_attn.q_b_proj",
    kv_a="self_attn.kv_a_proj_with_mqa",
    kv_a_norm="self_attn.kv_a_layernorm",
    kv_b="self_attn.kv_b_proj",
    sinks="self_attn.sinks",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    gate_up="mlp.gate_up_proj",
    down="mlp.down_proj",
    router="mlp.gate block_sparse_moe.gate mlp.router",
    experts__gate="mlp.experts.{e}.gate_proj block_sparse_moe.experts.{e}.w1 mlp.experts.{e}.w1",
    experts__up="mlp.experts.{e}.up_proj block_sparse_moe.experts.{e}.w3 mlp.experts.{e}.w3",
    experts__down="mlp.experts.{e}.down_proj block_sparse_moe.experts.{e}.w2 mlp.experts.{e}.w2",
    all_experts__gate_up="mlp.experts.gate_up_proj",
    all_experts__down="mlp.experts.down_proj",
    shared__gate="mlp.shared_expert.gate_proj mlp.shared_experts.gate_proj",
    shared__up="mlp.shared_expert.up_proj mlp.shared_experts.up_proj",
    shared__down="mlp.shared_expert.down_proj mlp.shared_experts.down_proj",
    shared_gate="mlp.shared_expert_gate",
    group_router="block_sparse_moe.group_gate",
    lstm_input="lstm.input",
    lstm_recurrent="lstm.recurrent",
    mod_router="mod_router",
    mod_hidden="mod_predictor.fc1",
    mod_out="mod_predictor.fc2",
)
POST_NORM_LAYER = renamed(
    LAYER,
    attn_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)

# GGUF has one table for all families. A gated FFN whose `ffn_up` has twice the rows holds gate and up (phi3).
GGUF_MODEL = renamed(
    {}, embed="token_embd", final_norm="output_norm", head="output", positions="position_embd",
)  # fmt: skip
GGUF_LAYER = renamed(
    {},
    attn_norm="attn_norm",
    attn_post_norm="post_attention_norm",
    ffn_norm="ffn_norm",
    ffn_post_norm="post_ffw_norm",
    q="attn_q",
    k="attn_k",
    v="attn_v",
    qkv="attn_qkv",
    o="attn_output",
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    q_a="attn_q_a",
    q_a_norm="attn_q_a_norm",
    q_b="attn_q_b",
    kv_a="attn_kv_a_mqa",
    kv_a_norm="attn_kv_a_norm",
    kv_b="attn_kv_b",
    k_b="attn_k_b",
    v_b="attn_v_b",
    sinks="attn_sinks",
    gate="ffn_gate",
    up="ffn_up",
    gate_up="ffn_up",
    down="ffn_down",
    router="ffn_gate_inp",
    experts__gate="ffn_gate.{e}",
    experts__up="ffn_up.{e}",
    experts__down="ffn_down.{e}",
    all_experts__gate="ffn_gate_exps",
    all_experts__up="ffn_up_exps",
    all_experts__gate_up="ffn_gate_up_exps",
    all_experts__down="ffn_down_exps",
    shared__gate="ffn_gate_shexp",
    shared__up="ffn_up_shexp",
    shared__down="ffn_down_shexp",
    shared_gate="ffn_gate_inp_shexp",
)
# In a parallel block with two norms (falcon-40b) `attn_norm` is the FFN's, and `attn_norm_2` the attention's.
GGUF_PARALLEL_LAYER = renamed(GGUF_LAYER, attn_norm="attn_norm_2", ffn_norm="attn_norm")
# gpt-oss names the norm before the FFN after what stands before it.
GGUF_OSS_LAYER = renamed(GGUF_LAYER, attn_post_norm="", ffn_norm="post_attention_norm")
