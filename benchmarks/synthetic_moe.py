"""Mixture-of-experts checkpoints of real shapes with random weights, whose choice of experts changes gradually.

What a cache of experts is worth hangs on how often a token asks for those of the token before. Here attention looks
at the last few tokens, so that the stream drifts rather than jumps, and routers read the stream: some two fifths of a
token's experts were also chosen for the token before. Routers do not see the direction that all tokens share; if they
did, every token would choose the same experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .synthetic_relu import CONSTANT, MLP, NEAR, SHARPNESS, STREAM, Add, signs

ATTENTION = 0.35  # what one attention block adds, relative to the embeddings
MIXED = 0.45  # root mean square of values averaged over the tokens that attention looks at
GATED = 0.6  # root mean square of silu(gate) * up for inputs of variance one
DECIDED = 1.5  # standard deviation of router logits: how unevenly the chosen experts weigh

COMMON: dict[str, Any] = {
    "dtype": "bfloat16", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False,
    "hidden_act": "silu", "head_dim": 128, "num_key_value_heads": 4, "output_router_logits": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    # Mixtral's ratios: 8 experts of 3.5 times the width, 2 a token: 5.9 GB
    "mixtral-5g": COMMON | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 1536,
        "intermediate_size": 5376, "num_hidden_layers": 14, "num_attention_heads": 12, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    # many small experts, as Qwen3-30B-A3B: 64, 8 a token: 5.8 GB
    "qwen3moe-6g": COMMON | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 1024,
        "intermediate_size": 3072, "moe_intermediate_size": 768, "num_hidden_layers": 18, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "use_sliding_window": False,
    },
}  # fmt: skip


def near(config: dict[str, Any]) -> torch.Tensor:
    """The query and key [head_dim] of every token: rotary embedding turns it into attention to near tokens."""
    hd = config["head_dim"]
    rate = config["rope_theta"] ** (-torch.arange(0, hd, 2) / hd)
    amplitude = ((rate > NEAR[0]) & (rate < NEAR[1])).float().repeat(2)
    return amplitude / amplitude.norm() * math.sqrt(SHARPNESS * math.sqrt(hd))


def blind(count: int, shared: torch.Tensor) -> torch.Tensor:
    """Random readers [count, d] of the stream that do not see the direction `shared` of plus and minus ones, [d]."""
    weight = torch.randn(count, len(shared)) / math.sqrt(len(shared))
    return weight - (weight @ shared)[:, None] * shared / len(shared)


def attention(config: dict[str, Any], shared: torch.Tensor) -> dict[str, torch.Tensor]:
    d, hd = len(shared), config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    place = near(config)
    reader = shared / (d * CONSTANT)  # reads 1 off every embedding
    spread = 0.3 * place.norm() / math.sqrt(hd * d)
    found = {
        "q_proj": place.repeat(heads)[:, None] * reader + torch.randn(heads * hd, d) * spread,
        "k_proj": place.repeat(kv)[:, None] * reader + torch.randn(kv * hd, d) * spread,
        "v_proj": blind(kv * hd, shared),
        "o_proj": torch.randn(d, heads * hd) * STREAM * ATTENTION / MIXED / math.sqrt(heads * hd),
    }
    if config["model_type"] == "qwen3_moe":  # queries and keys are normed: the norm's weight sets the sharpness
        gain = torch.full((hd,), place.norm().item() / math.sqrt(hd))
        found |= {"q_norm": gain, "k_norm": gain.clone()}
    return {f"self_attn.{name}.weight": weight for name, weight in found.items()}


def experts(config: dict[str, Any], shared: torch.Tensor) -> dict[str, torch.Tensor]:
    """Router and experts of a layer under the names of the family."""
    if config["model_type"] == "mixtral":
        home, (gate, up, down) = "block_sparse_moe", ("w1", "w3", "w2")
        count, width = config["num_local_experts"], config["intermediate_size"]
    else:
        home, (gate, up, down) = "mlp", ("gate_proj", "up_proj", "down_proj")
        count, width = config["num_experts"], config["moe_intermediate_size"]
    found = {f"{home}.gate.weight": blind(count, shared) * DECIDED}
    for e in range(count):
        expert = f"{home}.experts.{e}"
        found[f"{expert}.{gate}.weight"] = blind(width, shared)
        found[f"{expert}.{up}.weight"] = blind(width, shared)
        found[f"{expert}.{down}.weight"] = torch.randn(len(shared), width) * STREAM * MLP / GATED / math.sqrt(width)
    return found


def write(config: dict[str, Any], add: Add) -> None:
    """Give the tensors of a checkpoint, float32, a layer at a time in the order of the forward pass, to `add`."""
    d, vocab = config["hidden_size"], config["vocab_size"]
    shared = signs(d)
    own = torch.randn(vocab, d) * math.sqrt(1 - CONSTANT**2)
    add({"model.embed_tokens.weight": (own + shared * CONSTANT) * STREAM})
    for i in range(config["num_hidden_layers"]):
        layer = attention(config, shared) | experts(config, shared)
        layer |= {f"{norm}.weight": torch.ones(d) for norm in ("input_layernorm", "post_attention_layernorm")}
        add({f"model.layers.{i}.{name}": weight for name, weight in layer.items()})
    add({"model.norm.weight": torch.ones(d), "lm_head.weight": torch.randn(vocab, d) * 2 / math.sqrt(d)})
