"""The table of families: a frozen row a `model_type` says what differs from llama, so a new family is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .family import Family
from .names import GGUF_OSS_LAYER, LAYER, MODEL, POST_NORM_LAYER, renamed

_LLAMA = Family(
    "llama",
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False,
              "bos_token_id": 1, "eos_token_id": 2, "norm_topk_prob": False},
    words={"norm_eps": "rms_norm_eps", "num_experts": "num_experts", "moe_intermediate_size": "moe_intermediate_size"},
)  # fmt: skip


def _row(base: Family, model_type: str, *, defaults: Mapping[str, Any], words: Mapping[str, str] | None = None,
         **changed: Any) -> Family:  # fmt: skip
    merged = MappingProxyType({**base.defaults, **defaults})
    return replace(
        base,
        model_type=model_type,
        defaults=merged,
        words=MappingProxyType({**base.words, **(words or {})}),
        **changed,
    )


_GPT_OSS_ROPE: dict[str, Any] = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                 "truncate": False, "original_max_position_embeddings": 4096}  # fmt: skip
_NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
_QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
                         "num_key_value_heads": 32, **_NO_IDS}  # fmt: skip
_GEMMA: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "head_dim": 256,
                          "num_key_value_heads": 16, "tie_word_embeddings": True, "bos_token_id": 2,
                          "eos_token_id": 1}  # fmt: skip

_QWEN2 = _row(_LLAMA, "qwen2", defaults=_QWEN, window="upper", window_flag="use_sliding_window")
_GEMMA1 = _row(
    _LLAMA,
    "gemma",
    defaults=_GEMMA,
    act_means={"gelu": "gelu_tanh"},
    norm_offset=1.0,
    scale_embedding=True,
)
_GEMMA2 = _row(
    _GEMMA1,
    "gemma2",
    defaults={"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
              "sliding_window_pattern": 2, "num_key_value_heads": 4, "attn_logit_softcapping": 50.0,
              "final_logit_softcapping": 30.0},
    words={"hidden_act": "hidden_activation"},
    act_means={},
    post_norms=True,
    query_scale=True,
    attn_softcap=True,
    final_softcap=True,
    window="pattern",
    layer_names=POST_NORM_LAYER,
)  # fmt: skip
_MIXTRAL = _row(
    _LLAMA,
    "mixtral",
    defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8,
              "num_key_value_heads": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    words={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
    window="all",
    experts="all",
    norm_topk_prob=True,
)  # fmt: skip

_ROWS = (
    _LLAMA,
    _row(
        _LLAMA,
        "mistral",
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
        window="all",
    ),
    _QWEN2,
    _row(_QWEN2, "qwen3", defaults={"head_dim": 128}, qk_norm="head"),
    _GEMMA1,
    _GEMMA2,
    _row(
        _GEMMA2,
        "gemma3_text",
        # The published multimodal configs leave out what equals these.
        defaults={"vocab_size": 262208, "num_attention_heads": 8, "hidden_size": 2304,
                  "intermediate_size": 9216, "num_hidden_layers": 26, "max_position_embeddings": 131072,
                  "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
                  "attn_logit_softcapping": None, "final_logit_softcapping": None},
        attn_softcap=False,
        qk_norm="head",
        local_rope=True,
    ),
    _row(
        _LLAMA,
        "phi",
        defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
        words={"norm_eps": "layer_norm_eps"},
        gated=False,
        norm="layer",
        parallel_block=True,
        qk_norm="head",
        qk_norm_flag="qk_layernorm",
        partial_rotary=0.5,
        model_names=renamed(MODEL, final_norm="final_layernorm"),
        layer_names=renamed(LAYER, ffn_norm="", o="self_attn.dense", up="mlp.fc1", down="mlp.fc2",
                           q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"),
    ),
    _row(
        _LLAMA,
        "phi3",
        defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                  "eos_token_id": 32000},
        partial_rotary=1.0,
        window="all",
    ),
    _row(
        _LLAMA,
        "opt",
        defaults={"activation_function": "relu", "tie_word_embeddings": True, "bos_token_id": 2,
                  "layer_norm_eps": 1e-5},
        words={"norm_eps": "layer_norm_eps", "intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        gated=False,
        norm="layer",
        rotary=False,
        model_names=renamed({}, embed="decoder.embed_tokens", final_norm="decoder.final_layer_norm",
                           positions="decoder.embed_positions", project_in="decoder.project_in",
                           project_out="decoder.project_out"),
        layer_names=renamed(LAYER, attn_norm="self_attn_layer_norm", ffn_norm="final_layer_norm",
                           o="self_attn.out_proj", up="fc1", down="fc2"),
        layer_prefix="decoder.layers.{i}.",
    ),
    _row(
        _LLAMA,
        "falcon",
        defaults={"activation": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "bos_token_id": 11,
                  "eos_token_id": 11, "multi_query": True, "parallel_attn": True},
        words={"norm_eps": "layer_norm_epsilon", "hidden_act": "activation", "intermediate_size": "ffn_hidden_size",
               "num_key_value_heads": "num_kv_heads"},
        gated=False,
        norm="layer",
        qkv_layout="grouped",
        model_names=renamed({}, embed="word_embeddings", final_norm="ln_f"),
        layer_names=renamed(LAYER, attn_norm="input_layernorm ln_attn", ffn_norm="post_attention_layernorm ln_mlp",
                           qkv="self_attention.query_key_value", o="self_attention.dense", up="mlp.dense_h_to_4h",
                           down="mlp.dense_4h_to_h"),
        prefix="transformer.",
        layer_prefix="h.{i}.",
    ),
    _row(
        _LLAMA,
        "persimmon",
        defaults={"hidden_act": "relu2", "max_position_embeddings": 16384, "layer_norm_eps": 1e-5,
                  "qk_layernorm": True},
        words={"norm_eps": "layer_norm_eps"},
        gated=False,
        norm="layer",
        qkv_layout="grouped",
        qk_norm="head",
        qk_norm_flag="qk_layernorm",
        partial_rotary=0.5,
        model_names=renamed(MODEL, final_norm="final_layernorm"),
        layer_names=renamed(LAYER, qkv="self_attn.query_key_value", o="self_attn.dense", up="mlp.dense_h_to_4h",
                           down="mlp.dense_4h_to_h", q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"),
    ),
    _row(
        _LLAMA,
        "nemotron",
        defaults={"hidden_act": "relu2", "max_position_embeddings": 4096, "norm_eps": 1e-5, "bos_token_id": 2,
                  "eos_token_id": 3},
        words={"norm_eps": "norm_eps"},
        gated=False,
        norm="layer",
        norm_offset=1.0,
        partial_rotary=0.5,
    ),
    _row(
        _LLAMA,
        "arcee",
        defaults={"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                  "bos_token_id": 128000, "eos_token_id": 128001},
        gated=False,
    ),
    _MIXTRAL,
    _row(
        _QWEN2,
        "qwen2_moe",
        defaults={"num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                  "shared_expert_intermediate_size": 5632},
        window="lower_alternate",
        experts="sparse_step",
        shared_expert="gated",
    ),
    _row(
        _QWEN2,
        "qwen3_moe",
        defaults={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                  "num_key_value_heads": 4},
        window="all",
        qk_norm="head",
        experts="sparse_step",
    ),
    _row(
        _LLAMA,
        "olmoe",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279,
                  "num_experts": 64, "num_experts_per_tok": 8},
        words={"moe_intermediate_size": "intermediate_size"},
        qk_norm="full",
        experts="all",
    ),
    _row(
        _LLAMA,
        "deepseek_v2",
        defaults={"hidden_size": 4096, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407,
                  "first_k_dense_replace": 0, "moe_layer_freq": 1, "topk_method": "greedy",
                  "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
                  "qk_rope_head_dim": 64, "v_head_dim": 128},
        words={"num_experts": "n_routed_experts"},
        experts="after_dense",
        shared_expert="counted",
        norm_topk_prob=False,  # as transformers has it
        expert_groups=True,
        latent_attention=True,
        interleaved_rope=True,
    ),
    _row(
        _LLAMA,
        "gpt_oss",
        defaults={"head_dim": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
                  "rope_theta": 150000.0, "rope_parameters": _GPT_OSS_ROPE, "num_local_experts": 128,
                  "num_experts_per_tok": 4, "sliding_window": 128, "sliding_window_pattern": 2, "swiglu_alpha": 1.702,
                  "swiglu_limit": 7.0, **_NO_IDS},
        words={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        window="pattern",
        experts="all",
        norm_topk_prob=True,  # a softmax over the chosen logits is the same
        fused_experts=True,
        sinks=True,
        gguf_layer_names=GGUF_OSS_LAYER,
    ),
    _row(  # our own: what `genai-run train stories-mod` writes
        _LLAMA,
        "mixture_of_depths",
        defaults={"rms_norm_eps": 1e-5, "num_local_experts": 0, "num_experts_per_tok": 2, "num_noop_experts": 0,
                  "norm_topk_prob": True, "mod_capacity": 0.0, "mod_interval": 2, "mod_decoding": "router",
                  "mod_predictor_size": 64},
        words={"num_experts": "num_local_experts"},
        experts="optional",
        depth=True,
    ),
    _row(  # our own too: what `genai-run train stories-moe-lstm` writes
        _LLAMA,
        "moe_lstm",
        defaults={"hidden_act": "relu", "rms_norm_eps": 1e-5, "num_attention_heads": 1, "num_key_value_heads": 1,
                  "norm_topk_prob": True},
        words={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        gated=False,
        rotary=False,
        experts="all",
        norm_topk_prob=True,
        recurrent=True,
        layer_names=renamed(LAYER, experts__gate="", experts__up="block_sparse_moe.experts.{e}.w1",
                            experts__down="block_sparse_moe.experts.{e}.w2"),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in _ROWS})

# Multimodal wrappers whose `text_config` is one of ours and whose text runs on its own, causally.
WRAPPERS: Mapping[str, str] = MappingProxyType({"gemma3": "gemma3_text", "mistral3": "mistral"})
