"""config.json in every spelling since 2022, read into one `ModelConfig`. What a file omits is its family's default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import DepthConfig, MlaConfig, ModelConfig, MoeConfig, RopeConfig
from ..errors import CorruptCheckpointError, UnsupportedModelError, nearest
from .families import FAMILIES, WRAPPERS, Family
from .rope_config import FULL, SLIDING, number, parse_rope

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
_MOST = {"num_hidden_layers": 10_000, "num_experts": 100_000}  # beyond these a file is damaged, not large


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


class _Reader:
    """Typed reads of a config by our words: the family's key, then its default."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family, self.config = family, config

    def get(self, word: str, *other_keys: str) -> Any:
        for key in (self.family.key(word), *other_keys):
            if key in self.config:
                return self.config[key]
        return self.family.defaults.get(self.family.key(word))

    def size(self, word: str, *other_keys: str, default: int | None = None) -> int:
        key = self.family.key(word)
        value = self.get(word, *other_keys)
        value = default if value is None else value
        if value is None:
            raise CorruptCheckpointError(f"The config lacks '{key}'.")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST.get(word, 2**31):
            raise CorruptCheckpointError(f"The config's '{key}' is {value!r}, which cannot be.")
        return value

    def flag(self, word: str, default: bool = False) -> bool:
        value = self.get(word)
        return default if value is None else bool(value)

    def optional(self, word: str) -> float | None:
        return None if self.get(word) is None else number({word: self.get(word)}, word, "file")


def _activation(family: Family, read: _Reader) -> str:
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


def _window(family: Family, read: _Reader, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """(tokens a sliding layer sees, itself included; which layers slide)."""
    if family.window == "none" or (family.window_flag and not read.flag(family.window_flag)):
        return None, ()
    if not read.get("sliding_window"):
        return None, ()
    window = read.size("sliding_window")
    types = read.config.get("layer_types") if family.window != "all" else None
    if types is not None:
        names = {"attention": FULL, FULL: FULL, SLIDING: SLIDING}
        if not isinstance(types, list | tuple) or len(types) != layers:
            raise CorruptCheckpointError(f"The config's 'layer_types' does not name each of its {layers} layers.")
        odd = [kind for kind in types if not isinstance(kind, str) or kind not in names]
        if odd:
            raise UnsupportedModelError(f"The layer type '{odd[0]}' is not supported; {FULL} and {SLIDING} are.")
        sliding = [names[kind] == SLIDING for kind in types]
    elif family.window == "all":
        sliding = [True] * layers
    elif family.window == "pattern":
        pattern = read.size("sliding_window_pattern", "_sliding_window_pattern")
        sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    else:
        edge = read.get("max_window_layers")
        if isinstance(edge, bool) or not isinstance(edge, int) or edge < 0:
            raise CorruptCheckpointError(f"The config's 'max_window_layers' is {edge!r}, which cannot be.")
        upper = family.window == "upper"
        sliding = [i >= edge if upper else i < edge and i % 2 == 0 for i in range(layers)]
    return (window, tuple(sliding)) if any(sliding) else (None, ())


def _experts(family: Family, read: _Reader, layers: int) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    if family.experts == "none":
        return None, ()
    if family.experts == "optional" and not read.get("num_experts"):
        return None, ()
    sparse = [not family.recurrent or i + 1 < layers for i in range(layers)]  # between LSTMs, not behind the last
    if family.experts == "sparse_step":
        step, dense = read.size("decoder_sparse_step", default=1), read.get("mlp_only_layers") or []
        if not isinstance(dense, list | tuple):
            raise CorruptCheckpointError(f"The config's 'mlp_only_layers' is {dense!r}, not a list.")
        sparse = [i not in dense and (i + 1) % step == 0 for i in range(layers)]
        if not any(sparse) or read.get("num_experts", "num_local_experts") == 0:
            return None, ()
    if family.experts == "after_dense":
        first, step = read.get("first_k_dense_replace") or 0, read.size("moe_layer_freq")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise CorruptCheckpointError(f"The config's 'first_k_dense_replace' is {first!r}, which cannot be.")
        sparse = [i >= first and i % step == 0 for i in range(layers)]
        if not any(sparse):
            return None, ()
    experts = read.size("num_experts", "num_experts", "num_local_experts")
    chosen = read.size("num_experts_per_tok")
    noops = read.size("num_noop_experts") if read.get("num_noop_experts") else 0
    if chosen > experts + noops:
        raise CorruptCheckpointError(f"The config's 'num_experts_per_tok' {chosen} is more than its {experts} experts.")
    gates, few = 0, 0
    if family.recurrent and read.get("num_expert_groups"):
        gates, few = read.size("num_expert_groups"), read.size("gate_groups_per_tok")
        if experts % gates or few > gates or chosen % few or chosen // few > experts // gates:
            raise CorruptCheckpointError(
                f"The config's 'num_expert_groups' {gates} and 'gate_groups_per_tok' {few} do not divide its "
                f"{experts} experts and the {chosen} of a token."
            )
    width, shared = read.size("moe_intermediate_size"), 0
    if family.shared_expert == "gated":
        shared = read.size("shared_expert_intermediate_size")
    elif family.shared_expert == "counted" and read.get("n_shared_experts"):
        shared = width * read.size("n_shared_experts")
    groups, of_groups = _groups(family, read, experts, chosen)
    clamped = read.optional("swiglu_alpha"), read.optional("swiglu_limit")
    moe = MoeConfig(
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
        norm_topk_prob=read.flag("norm_topk_prob") if family.norm_topk_prob is None else family.norm_topk_prob,
        shared_expert_intermediate_size=shared,
        shared_expert_gate=family.shared_expert == "gated",
        num_noop_experts=noops,
        num_groups=groups,
        groups_per_tok=of_groups,
        routed_scaling=(read.optional("routed_scaling_factor") or 1.0) if family.expert_groups else 1.0,
        clamped_swiglu=(clamped[0] or 1.702, clamped[1] or 7.0) if family.fused_experts else None,
        interleaved=family.fused_experts and read.config.get("expert_layout") != "split",
        gate_groups=gates,
        gate_groups_per_tok=few,
    )
    return moe, () if all(sparse) else tuple(sparse)


def _groups(family: Family, read: _Reader, experts: int, chosen: int) -> tuple[int, int]:
    """(groups of experts, groups that a token takes from)."""
    method = (read.get("topk_method") or "greedy") if family.expert_groups else "greedy"
    if method == "greedy":
        return 1, 1
    if method != "group_limited_greedy":
        raise UnsupportedModelError(
            f"The 'topk_method' '{method}' is not supported; greedy and group_limited_greedy are."
        )
    groups, few = read.size("n_group"), read.size("topk_group")
    if experts % groups or few > groups or few * (experts // groups) < chosen:
        raise CorruptCheckpointError(
            f"The config's 'n_group' {groups} and 'topk_group' {few} do not fit {experts} experts, {chosen} a token."
        )
    return groups, few


def _latent(family: Family, read: _Reader) -> MlaConfig | None:
    if not family.latent_attention:
        return None
    return MlaConfig(
        kv_lora_rank=read.size("kv_lora_rank"),
        qk_nope_head_dim=read.size("qk_nope_head_dim"),
        qk_rope_head_dim=read.size("qk_rope_head_dim"),
        v_head_dim=read.size("v_head_dim"),
        q_lora_rank=None if read.get("q_lora_rank") is None else read.size("q_lora_rank"),
    )


def _latent_scale(mla: MlaConfig, rope: RopeConfig | None) -> float:
    """What q.k is multiplied by: YaRN's temperature over all dimensions goes in here, squared."""
    scale = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5
    if rope is not None and rope.mscale_all_dim and rope.factor > 1:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    return scale


def _depth(family: Family, read: _Reader, layers: int) -> DepthConfig | None:
    """Which blocks may be skipped: every `mod_interval`-th, so that the first never is."""
    capacity = read.optional("mod_capacity") if family.depth and read.get("mod_capacity") else None
    if capacity is None:
        return None
    interval, decoding = read.size("mod_interval"), read.get("mod_decoding")
    if decoding not in ("router", "predictor") or capacity > 1:
        raise CorruptCheckpointError(
            f"The config's 'mod_decoding' {decoding!r} or 'mod_capacity' {capacity!r} cannot be: "
            "router or predictor, and a share of the tokens."
        )
    which = tuple((i + 1) % interval == 0 for i in range(layers))
    return DepthConfig(which, capacity, decoding, read.size("mod_predictor_size"))


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


def _token_ids(value: Any, key: str) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise CorruptCheckpointError(f"The config's '{key}' is {value!r}, which is no token id.")
    return tuple(i for i in ids if i >= 0)


def _heads(family: Family, read: _Reader, hidden: int, mla: MlaConfig | None) -> tuple[int, int, int]:
    """(query heads, key and value heads, dimensions of a head)."""
    heads = read.size("num_attention_heads")
    kv_heads = read.size("num_key_value_heads", "num_key_value_heads", default=heads)
    if family.model_type == "falcon" and not read.flag("new_decoder_architecture"):
        kv_heads = 1 if read.flag("multi_query") else heads
    if heads % kv_heads:
        raise CorruptCheckpointError(
            f"The config's 'num_attention_heads' {heads} is not a multiple of "
            f"'{family.key('num_key_value_heads')}' {kv_heads}."
        )
    if mla is not None:
        return heads, heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if read.get("head_dim") is not None:
        return heads, kv_heads, read.size("head_dim")
    if hidden % heads:
        raise CorruptCheckpointError(
            f"The config's 'hidden_size' {hidden} is not a multiple of 'num_attention_heads' {heads}."
        )
    return heads, kv_heads, hidden // heads


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model a config.json (or GGUF metadata in its words) describes.

    Raises UnsupportedModelError for an architecture, activation, RoPE or layer type that we do not run, naming it and
    the nearest we do; CorruptCheckpointError naming the key for a number that is missing or impossible.
    """
    family, config = family_of(config)
    _refuse(family, config)
    read = _Reader(family, config)
    hidden, layers = read.size("hidden_size", "n_embed"), read.size("num_hidden_layers")
    mla = _latent(family, read)
    heads, kv_heads, head_dim = _heads(family, read, hidden, mla)
    if family.recurrent and (heads, kv_heads, head_dim, layers > 1) != (1, 1, hidden, True):
        raise CorruptCheckpointError("A recurrent model has one 'num_attention_heads', and two layers or more.")
    rope, rope_local = parse_rope(family, config, head_dim if mla is None else mla.qk_rope_head_dim)
    window, sliding = _window(family, read, layers)
    moe, moe_layers = _experts(family, read, layers)
    mod = _depth(family, read, layers)
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
    scale = _latent_scale(mla, rope) if mla is not None else None if scalar is None else scalar**-0.5
    eps = number(config, family.key("norm_eps"), "file", family.defaults[family.key("norm_eps")], least=-1e-30)
    bos = _token_ids(read.get("bos_token_id"), "bos_token_id")
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
        eos_token_ids=_token_ids(read.get("eos_token_id"), "eos_token_id"),
    )
