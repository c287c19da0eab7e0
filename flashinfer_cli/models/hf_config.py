"""config.json in every spelling since 2022, read into one `ModelConfig`. What a file omits is its family's default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import CorruptCheckpointError, UnsupportedModelError, nearest
from .attention_config import latent_scale, parse_heads, parse_latent, parse_window
from .config_reader import ConfigReader
from .families import FAMILIES, WRAPPERS
from .family import Family
from .moe_config import parse_depth, parse_experts
from .rope_config import number, parse_rope

ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_quick": "gelu_quick",
    "quick_gelu": "gelu_quick",
}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "half": "F16", "float": "F32"}


def family_of(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family's row and the part of `config` that describes the language model.

    Raises UnsupportedModelError naming an unknown `model_type` and the nearest supported one.
    """
    if not isinstance(config, Mapping):
        raise CorruptCheckpointError("The config is not a JSON object.")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CorruptCheckpointError("The config has no 'model_type', so the architecture is unknown.")
    inner = config.get("text_config")
    if model_type in WRAPPERS and isinstance(inner, Mapping):
        above = {key: config[key] for key in ("dtype", "torch_dtype", "eos_token_id", "bos_token_id",
                                              "tie_word_embeddings") if config.get(key) is not None}  # fmt: skip
        return family_of({**above, "model_type": WRAPPERS[model_type], **inner})
    if model_type not in FAMILIES:
        near = nearest(model_type, FAMILIES)
        known = ", ".join(sorted(FAMILIES))
        hint = f"The nearest supported one is '{near}'. " if near else ""
        raise UnsupportedModelError(f"The model_type '{model_type}' is not supported.", f"{hint}Supported: {known}.")
    return FAMILIES[model_type], dict(config)


def _activation(family: Family, read: ConfigReader) -> str:
    name = read.get("hidden_act", "hidden_activation", "hidden_act")
    if name is None:
        name = family.defaults.get(family.key("hidden_act"))
    found = family.act_means.get(name) or ACTIVATIONS.get(name) if isinstance(name, str) else None
    if found is None:
        near = nearest(str(name), ACTIVATIONS)
        raise UnsupportedModelError(
            f"The activation '{name}' ('{family.key('hidden_act')}') is not supported.",
            f"The nearest one that is: '{near}'." if near else None,
        )
    return found


def _refuse(family: Family, config: Mapping[str, Any]) -> None:
    """What the config asks for and we do not do."""
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else None
    if method is not None and not (family.fused_experts and method == "mxfp4"):
        raise UnsupportedModelError(
            f"The weights are quantized with '{method}', which is not supported.",
            "Take the original folder, or a GGUF file.",
        )
    if config.get("alibi"):
        raise UnsupportedModelError("The config asks for 'alibi' positions, which are not supported; RoPE is.")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("The config asks for bidirectional attention: an encoder, not a language model.")
    if config.get("layer_norm_elementwise_affine") is False:
        raise UnsupportedModelError("Layer norms without weights ('layer_norm_elementwise_affine') are not supported.")


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model a config.json (or GGUF metadata in its words) describes.

    Raises UnsupportedModelError for an architecture, activation, RoPE or layer type that we do not run, naming it and
    the nearest we do; CorruptCheckpointError naming the key for a number that is missing or impossible.
    """
    family, config = family_of(config)
    _refuse(family, config)
    read = ConfigReader(family, config)
    hidden, layers = read.size("hidden_size", "n_embed"), read.size("num_hidden_layers")
    mla = parse_latent(family, read)
    heads, kv_heads, head_dim = parse_heads(family, read, hidden, mla)
    if family.recurrent and (heads, kv_heads, head_dim, layers > 1) != (1, 1, hidden, True):
        raise CorruptCheckpointError("A recurrent model has one 'num_attention_heads', and two layers or more.")
    rope, rope_local = parse_rope(family, config, head_dim if mla is None else mla.qk_rope_head_dim)
    window, sliding = parse_window(family, read, layers)
    moe, moe_layers = parse_experts(family, read, layers)
    mod = parse_depth(family, read, layers)
    if (mod is not None or mla is not None) and rope is not None and rope.rope_type in ("dynamic", "longrope"):
        what = "Latent attention" if mod is None else "Blocks that tokens skip"
        raise UnsupportedModelError(f"{what} cannot keep keys for the RoPE type '{rope.rope_type}'.")
    falcon, opt = family.model_type == "falcon", family.model_type == "opt"
    new_falcon = falcon and read.flag("new_decoder_architecture")
    parallel = family.parallel_block or new_falcon or (falcon and read.flag("parallel_attn"))
    two_norms = new_falcon and read.get("num_ln_in_parallel_attn") in (None, 2)
    qk_norm = family.qk_norm if family.qk_norm_flag is None or read.flag(family.qk_norm_flag) else "none"
    norm_first = not opt or read.flag("do_layer_norm_before", True)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    embed = read.size("word_embed_proj_dim", default=hidden)
    scalar = read.optional("query_pre_attn_scalar") if family.query_scale else None
    scale = latent_scale(mla, rope) if mla is not None else None if scalar is None else scalar**-0.5
    eps = number(config, family.key("norm_eps"), "file", family.defaults[family.key("norm_eps")], least=-1e-30)
    bos = read.token_ids("bos_token_id")
    return ModelConfig(
        model_type=family.model_type,
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.size("intermediate_size", "intermediate_size", default=4 * hidden if falcon else None),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=read.size("max_position_embeddings"),
        hidden_act=_activation(family, read),
        gated=family.gated,
        norm=family.norm,
        norm_eps=eps,
        norm_offset=0.0 if config.get("norm_offset_baked") else family.norm_offset,
        parallel_block=parallel,
        shared_norm=parallel and not two_norms,
        post_norms=family.post_norms,
        norm_first=norm_first,
        final_norm=not opt or (norm_first and not read.flag("_remove_final_layer_norm")),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        rope=rope,
        rope_local=rope_local,
        position_offset=2 if opt else 0,
        embed_size=embed if opt and embed != hidden else 0,
        qkv_layout="split" if config.get("qkv_layout") == "split" else family.qkv_layout,
        qk_norm=qk_norm,
        qk_norm_type=family.norm,
        clip_qkv=read.optional("clip_qkv"),
        attention_scale=scale,
        attn_logit_softcap=read.optional("attn_logit_softcapping") if family.attn_softcap else None,
        final_logit_softcap=read.optional("final_logit_softcapping") if family.final_softcap else None,
        embedding_scale=math.sqrt(hidden) if family.scale_embedding else 1.0,
        sliding_window=window,
        sliding_layers=sliding,
        attention_sinks=family.sinks,
        mla=mla,
        moe=moe,
        moe_layers=moe_layers,
        mod=mod,
        recurrent=family.recurrent,
        dtype=_DTYPES.get(dtype, "F32"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=read.token_ids("eos_token_id"),
    )
