"""GGUF metadata in the words of a config.json, so that models/ reads one vocabulary.

llama.cpp's converter does not only rename: it reorders and adjusts some weights. What that means for the arithmetic is
said by keys that no config.json has:
    rope_interleaved   pairs are (2j, 2j+1): rows of q and k were permuted (llama, arcee)
    rotary_dim         dimensions of a head that turn
    rope_freqs         divisors of the frequencies, as llama3 scaling gives them
    norm_offset_baked  the 1 of (1 + weight) is in the norm weights already (gemma, nemotron)
    qkv_layout         "split": falcon's fused rows were sorted into q | k | v
    expert_layout      "split": gate and up of gpt_oss' experts are no longer one matrix, row by row in turn
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedModelError, nearest
from .base import PLAIN, TensorInfo
from .files import quoted
from .gguf_keys import Keys
from .gguf_latent import latent_experts, latent_sizes
from .gguf_rope import make_rope

Config = dict[str, Any]


@dataclass(frozen=True)
class _Arch:
    """One `general.architecture`: its model_type, and what its files leave unsaid."""

    model_type: str
    eps: str = "rms_norm_eps"  # the config's key for what the norms add
    interleaved: bool = False
    norm_offset_baked: bool = False
    norm_topk_prob: bool | None = None  # for experts: what llama.cpp does, since no key says it
    window_pattern: int = 0  # every n-th layer sees everything, where no key says it
    latent: bool = False  # multi-head latent attention


ARCHITECTURES: Mapping[str, _Arch] = {
    "llama": _Arch("llama", interleaved=True),  # mistral and mixtral come under this name too
    "arcee": _Arch("arcee", interleaved=True),
    "qwen2": _Arch("qwen2"),
    "qwen3": _Arch("qwen3"),
    "qwen2moe": _Arch("qwen2_moe", norm_topk_prob=False),
    "qwen3moe": _Arch("qwen3_moe", norm_topk_prob=True),
    "olmoe": _Arch("olmoe", norm_topk_prob=False),
    "gemma": _Arch("gemma", norm_offset_baked=True),
    "gemma2": _Arch("gemma2", norm_offset_baked=True, window_pattern=2),
    "gemma3": _Arch("gemma3_text", norm_offset_baked=True, window_pattern=6),
    "phi2": _Arch("phi", eps="layer_norm_eps"),
    "phi3": _Arch("phi3"),
    "falcon": _Arch("falcon", eps="layer_norm_epsilon"),
    "nemotron": _Arch("nemotron", eps="norm_eps", norm_offset_baked=True),
    "deepseek2": _Arch("deepseek_v2", latent=True),  # V3's and others' routing comes under this name too
    "gpt-oss": _Arch("gpt_oss", window_pattern=2),
}
# Models whose attention scale does not follow from the size of a head (27B of gemma2 and gemma3), by number of layers.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def make_config(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> Config:
    """The config of a GGUF model, in Hugging Face's keys and the ones above. Reads nothing but the small RoPE tensors.

    Raises UnsupportedModelError naming an unknown architecture and the nearest that we run, CorruptCheckpointError
    naming a key that is missing or impossible.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CorruptCheckpointError(f"{path} lacks the key 'general.architecture'.")
    if name not in ARCHITECTURES:
        near = nearest(name, ARCHITECTURES)
        hint = f"The nearest supported one is '{near}'. " if near else ""
        raise UnsupportedModelError(
            f"The architecture {quoted(name)} of {path} is not supported.",
            f"{hint}Supported: {', '.join(ARCHITECTURES)}.",
        )
    arch, keys = ARCHITECTURES[name], Keys(metadata, name, path)
    config: Config = {"model_type": arch.model_type, **_sizes(keys, arch, tensors)}
    experts = latent_experts(keys, tensors, config) if arch.latent else _experts(keys, arch, tensors, config)
    config |= make_rope(keys, tensors, config["head_dim"]) | experts | _tokens(metadata)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if arch.interleaved:
        config["rope_interleaved"] = True
    if arch.norm_offset_baked:
        config["norm_offset_baked"] = True
    window = keys.get("attention.sliding_window")
    config["sliding_window"] = keys.size("attention.sliding_window") if window else None
    if arch.window_pattern and config["sliding_window"]:
        config["layer_types"] = _layer_types(keys, arch, config["num_hidden_layers"])
    if name.startswith("gemma"):
        config |= _gemma(keys, config)
    if name == "falcon":
        config |= _falcon(tensors, config)
    if name == "gpt-oss":
        config |= _gpt_oss(config)
    return config


def _sizes(keys: Keys, arch: _Arch, tensors: Mapping[str, TensorInfo]) -> Config:
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    latent = latent_sizes(keys) if arch.latent else {}
    head_dim = latent.get("head_dim") or keys.size("attention.key_length", max(hidden // heads, 1))
    if not latent and keys.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{keys.path} has keys and values of different lengths, which is not supported.")
    embedding, tokens = tensors.get("token_embd.weight"), keys.metadata.get("tokenizer.ggml.tokens")
    vocab = embedding.num_rows if embedding is not None else len(tokens) if isinstance(tokens, list) else None
    config: Config = {
        "vocab_size": vocab or keys.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _ffn_width(keys, tensors),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        **latent,
    }
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        eps = keys.real(key)
        if eps is not None:
            config[arch.eps] = eps
    clamp = keys.real("attention.clamp_kqv")
    if clamp:
        config["clip_qkv"] = clamp
    weights = [t for t in tensors.values() if len(t.shape) > 1]
    formats = {t.format for t in weights}
    if len(formats) == 1 and formats <= set(PLAIN):
        config["dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[formats.pop()]
    return config


def _ffn_width(keys: Keys, tensors: Mapping[str, TensorInfo]) -> int:
    """`feed_forward_length`; files that have experts in all layers may leave it out or say 0."""
    said = keys.by_layer("feed_forward_length") is not None or keys.get("feed_forward_length")
    return keys.size("feed_forward_length") if said else _expert_width(tensors) or keys.size("feed_forward_length")


def _expert_width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Rows of one expert's up projection, fused [experts, rows, cols] or in files of early 2024 apart [rows, cols]."""
    for name in ("ffn_up_exps", "ffn_up.0"):
        found = [t for key, t in tensors.items() if key.startswith("blk.") and key.endswith(f".{name}.weight")]
        if found and len(found[0].shape) > 1:
            return found[0].shape[-2]
    return None


def _experts(keys: Keys, arch: _Arch, tensors: Mapping[str, TensorInfo], config: Config) -> Config:
    if not keys.get("expert_count"):
        return {}
    experts = {"num_experts": keys.size("expert_count"), "num_experts_per_tok": keys.size("expert_used_count")}
    width = keys.size("expert_feed_forward_length", _expert_width(tensors) or config["intermediate_size"])
    made: Config = {**experts, "moe_intermediate_size": width}
    if keys.arch == "llama":
        made |= {"model_type": "mixtral", "num_local_experts": experts["num_experts"], "intermediate_size": width}
    if arch.model_type in ("olmoe", "gpt_oss"):
        made["intermediate_size"] = width
    if arch.norm_topk_prob is not None:
        made["norm_topk_prob"] = bool(keys.get("expert_weights_norm") or arch.norm_topk_prob)
    shared = tensors.get("blk.0.ffn_up_shexp.weight")
    if shared is not None:
        made["shared_expert_intermediate_size"] = keys.size("expert_shared_feed_forward_length", shared.num_rows)
    return made


def _layer_types(keys: Keys, arch: _Arch, layers: int) -> list[str]:
    pattern = keys.by_layer("attention.sliding_window_pattern")
    if pattern is not None:
        if pattern.size != layers:
            raise keys.wrong("attention.sliding_window_pattern", pattern)
        slides = [bool(value) for value in pattern]
    else:
        every = keys.size("attention.sliding_window_pattern", arch.window_pattern)
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _gemma(keys: Keys, config: Config) -> Config:
    made: Config = {
        "attn_logit_softcapping": keys.real("attn_logit_softcapping") or None,
        "final_logit_softcapping": keys.real("final_logit_softcapping") or None,
    }
    scale, layers = keys.real("attention.scale"), config["num_hidden_layers"]
    if scale:
        made["query_pre_attn_scalar"] = 1 / scale / scale
    elif _SCALED_BY_WIDTH.get(keys.arch) == layers:
        made["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    else:
        made["query_pre_attn_scalar"] = config["head_dim"]
    if keys.arch == "gemma3":
        made["rope_local_base_freq"] = keys.real("rope.freq_base_swa") or 10_000.0
    return made


def _falcon(tensors: Mapping[str, TensorInfo], config: Config) -> Config:
    """Two norms a block are 40B's; one is 7B's, and 11B's with several key and value heads."""
    two = "blk.0.attn_norm_2.weight" in tensors
    old = config["num_key_value_heads"] == 1 and not two
    return {
        "qkv_layout": "split",
        "parallel_attn": True,
        "multi_query": True,
        "new_decoder_architecture": not old,
        "num_kv_heads": config["num_key_value_heads"],
        "num_ln_in_parallel_attn": 2 if two else 1,
        "ffn_hidden_size": config["intermediate_size"],
    }


def _gpt_oss(config: Config) -> Config:
    """YaRN's corners are not rounded in this family; no key says so."""
    scaling = config.get("rope_scaling")
    return {"expert_layout": "split", "rope_scaling": scaling and {**scaling, "truncate": False}}


def _tokens(metadata: Mapping[str, Any]) -> Config:
    """bos_token_id, and eos_token_id: all that end a text, a turn or a message, a list where there are several."""

    def read(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) and 0 <= value < 1 << 31 else None

    ends = list(dict.fromkeys(value for key in _EOS_KEYS if (value := read(key)) is not None))
    return {"bos_token_id": read("bos_token_id"), "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def make_generation_config(metadata: Mapping[str, Any]) -> Config:
    """What a generation_config.json would say: ids, and the sampling a file recommends (`general.sampling.*`)."""
    made = {key: value for key, value in _tokens(metadata).items() if value is not None}
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip
    sampling = {}
    for key, name in names.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            sampling[name] = value
    if sampling:
        made |= sampling
        made["do_sample"] = sampling.get("temperature", 1.0) > 0
    return made
