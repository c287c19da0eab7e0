"""Small random models of every family, built by transformers and saved as safetensors: the outside oracle of the tests.

About 64 wide and 2 or 3 layers deep, so that building, saving and loading one takes a moment. Norms and biases are
random too, and weights are wide enough for logits to differ: a forgotten bias, offset or scale shows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

VOCAB = 128
Config = dict[str, Any]
Tiny = Callable[[str, int], tuple[Path, transformers.PreTrainedModel]]  # the fixture `tiny`


def _base(**changed: Any) -> Config:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return {key: value for key, value in (common | changed).items() if value is not ...}


def rope(rope_type: str = "default", theta: float = 10_000.0, **rest: Any) -> Config:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **rest}}


LLAMA3 = rope(
    "llama3", 5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LINEAR = rope("linear", factor=2.5)
DYNAMIC = rope("dynamic", factor=3.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_DEEP = rope("yarn", 1e5, factor=8.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0,
                 mscale=0.8, mscale_all_dim=0.5, truncate=False)  # fmt: skip


def _longrope(pairs: int, **rest: Any) -> Config:
    short = [1.0 + 0.1 * j for j in range(pairs)]
    long = [1.5 + 0.7 * j for j in range(pairs)]
    return rope("longrope", short_factor=short, long_factor=long, **rest)


_MHA: Config = {"num_key_value_heads": 4}
_MQA: Config = {"num_key_value_heads": 1}
_MLA: Config = {"num_key_value_heads": ..., "n_routed_experts": 6, "num_experts_per_tok": 2, "kv_lora_rank": 32,
                "moe_intermediate_size": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                "v_head_dim": 16}  # fmt: skip
_OSS: Config = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32,
                "max_position_embeddings": 131072} | rope("yarn", 15e4, factor=32.0, truncate=False,
                                                          original_max_position_embeddings=16)  # fmt: skip
_MOE: Config = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@cache
def _table() -> dict[str, list[Config]]:
    return {
        "llama": [
            _base(tie_word_embeddings=True),
            _base(**LLAMA3, max_position_embeddings=128),
            _base(**LINEAR, **_MHA, attention_bias=True, mlp_bias=True, hidden_act="relu"),
            _base(**DYNAMIC, **_MQA, max_position_embeddings=16, head_dim=32),
            _base(**YARN, num_hidden_layers=3),
            _base(**YARN_DEEP, num_attention_heads=8),
            _base(**_longrope(8, factor=4.0, original_max_position_embeddings=16)),
        ],
        "mistral": [
            _base(sliding_window=5, num_hidden_layers=3),
            _base(sliding_window=None, **_MQA, head_dim=24, tie_word_embeddings=True),
        ],
        "qwen2": [
            _base(use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=3),
            _base(**_MHA, **YARN, tie_word_embeddings=True),
            _base(**_MQA, **DYNAMIC, max_position_embeddings=16),
        ],
        "qwen3": [
            _base(head_dim=32, tie_word_embeddings=True),
            _base(head_dim=16, attention_bias=True, **YARN, use_sliding_window=True, sliding_window=6,
                  max_window_layers=1),
        ],
        "gemma": [_base(head_dim=32, **_MQA), _base(head_dim=16, **_MHA, attention_bias=True, rms_norm_eps=1e-5)],
        "gemma2": [
            _base(head_dim=32, sliding_window=5, query_pre_attn_scalar=24, num_hidden_layers=3),
            _base(head_dim=16, sliding_window=4, query_pre_attn_scalar=16, attn_logit_softcapping=3.0,
                  final_logit_softcapping=2.0, **_MHA),
        ],
        "gemma3_text": [
            _base(head_dim=32, sliding_window=5, query_pre_attn_scalar=40, sliding_window_pattern=2,
                  num_hidden_layers=3, **_MQA),
            _base(head_dim=16, sliding_window=4, query_pre_attn_scalar=16, final_logit_softcapping=5.0,
                  attn_logit_softcapping=4.0, layer_types=["full_attention", "sliding_attention"],
                  rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                                   "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}),
        ],
        "phi": [
            _base(**_MHA, partial_rotary_factor=0.5),
            _base(qk_layernorm=True, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4,
                                                      "partial_rotary_factor": 0.25}, num_hidden_layers=3),
        ],
        "phi3": [
            _base(sliding_window=5, tie_word_embeddings=True),
            _base(**_longrope(8), original_max_position_embeddings=16, **_MHA),
            _base(**_longrope(6, partial_rotary_factor=0.75), original_max_position_embeddings=8, **_MQA),
        ],
        "opt": [
            _opt(),
            _opt(do_layer_norm_before=False, word_embed_proj_dim=32, num_hidden_layers=3),
            _opt(enable_bias=False, activation_function="gelu", num_attention_heads=2, tie_word_embeddings=False),
        ],
        "falcon": [
            _falcon(multi_query=True, parallel_attn=True),
            _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True, tie_word_embeddings=False),
            _falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=96),
            _falcon(multi_query=False, parallel_attn=False, bias=True, **DYNAMIC, max_position_embeddings=16),
        ],
        "persimmon": [
            _base(num_key_value_heads=..., qk_layernorm=True),
            _base(num_key_value_heads=..., qk_layernorm=False, num_attention_heads=2, hidden_act="relu",
                  rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 25_000.0,
                                   "partial_rotary_factor": 0.25}, max_position_embeddings=16),
        ],
        "nemotron": [
            _base(partial_rotary_factor=0.5),
            _base(**_MQA, attention_bias=True, mlp_bias=True, head_dim=32, num_hidden_layers=3,
                  rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4,
                                   "partial_rotary_factor": 0.75}),
        ],
        "arcee": [_base(**YARN), _base(**_MHA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)],
        "mixtral": [
            _base(num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
            _base(num_local_experts=6, num_experts_per_tok=3, head_dim=24, **_MHA, tie_word_embeddings=True),
        ],
        "qwen2_moe": [
            _base(**_MOE, shared_expert_intermediate_size=48),
            _base(**_MOE, shared_expert_intermediate_size=40, norm_topk_prob=True, decoder_sparse_step=2,
                  num_hidden_layers=4, mlp_only_layers=[3], use_sliding_window=True, sliding_window=4,
                  max_window_layers=3, **_MHA),
        ],
        "qwen3_moe": [
            _base(**_MOE, norm_topk_prob=True, head_dim=32),
            _base(**_MOE, norm_topk_prob=False, mlp_only_layers=[0], num_hidden_layers=3, use_sliding_window=True,
                  sliding_window=5, attention_bias=True, head_dim=16, **_MQA),
        ],
        "olmoe": [
            _base(num_experts=6, num_experts_per_tok=2, **_MHA),
            _base(num_experts=4, num_experts_per_tok=3, norm_topk_prob=True, clip_qkv=0.6, **LINEAR),
        ],
        "deepseek_v2": [
            _base(**_MLA, first_k_dense_replace=1, num_hidden_layers=3, q_lora_rank=None, routed_scaling_factor=1.5),
            _base(**(_MLA | {"v_head_dim": 24}), q_lora_rank=24, n_shared_experts=1,
                  topk_method="group_limited_greedy", n_group=3, topk_group=2, routed_scaling_factor=2.0,
                  attention_bias=True, mlp_bias=True, first_k_dense_replace=1, num_attention_heads=8,
                  **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)),
        ],
        "gpt_oss": [
            _base(**_OSS, head_dim=16, sliding_window=5, num_hidden_layers=3),
            _base(**(_OSS | _MHA | rope() | {"num_experts_per_tok": 3}),
                  head_dim=24, sliding_window=4, layer_types=["full_attention",
                  "sliding_attention"], swiglu_limit=0.5),
        ],
    }  # fmt: skip


def _opt(**changed: Any) -> Config:
    return _base(intermediate_size=..., num_key_value_heads=..., ffn_dim=96, pad_token_id=1, **changed)


def _falcon(**changed: Any) -> Config:
    return _base(intermediate_size=..., num_key_value_heads=..., **changed)


def tiny_config_dicts() -> dict[str, list[Config]]:
    """Keyword arguments of the family's transformers config class, two or more a family. A fresh copy each time."""
    return {family: copy.deepcopy(configs) for family, configs in _table().items()}


def cases() -> list[tuple[str, int]]:
    """Every (family, index), for parametrised tests."""
    return [(family, index) for family, configs in _table().items() for index in range(len(configs))]


def hf_config(family: str, index: int, **changed: Any) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.for_model(family, **copy.deepcopy(_table()[family][index] | changed))


def hf_model(
    family: str, index: int, seed: int = 0, dtype: torch.dtype = torch.float32, **changed: Any
) -> transformers.PreTrainedModel:
    """A transformers model with random weights, in eval mode, with plain (eager) attention."""
    config = hf_config(family, index, **changed)
    config.dtype = dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32)
        offset = family.startswith("gemma") or family == "nemotron"
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name or ".ln_" in name:
                    centre = 1.0 if name.endswith("weight") and not offset else 0.0
                    weight.normal_(centre, 0.2)
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.2)
                elif "embed" in name:
                    weight.normal_(0.0, 0.7)
                else:
                    weight.normal_(0.0, 1.6 * weight.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def make(
    family: str, index: int, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changed: Any
) -> tuple[Path, transformers.PreTrainedModel]:
    """The model of `hf_model`, saved into `folder` as transformers saves it (config.json, model.safetensors)."""
    model = hf_model(family, index, seed, dtype, **changed)
    model.save_pretrained(folder)
    return Path(folder), model
