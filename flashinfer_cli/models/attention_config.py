"""Attention as a config.json describes it: heads, latent attention, and the layers whose window slides."""

from __future__ import annotations

import math

from ..config import MlaConfig, RopeConfig
from ..errors import CorruptCheckpointError, UnsupportedModelError
from .config_reader import ConfigReader
from .family import Family
from .rope_config import FULL, SLIDING


def parse_heads(family: Family, read: ConfigReader, hidden: int, mla: MlaConfig | None) -> tuple[int, int, int]:
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


def parse_latent(family: Family, read: ConfigReader) -> MlaConfig | None:
    if not family.latent_attention:
        return None
    return MlaConfig(
        kv_lora_rank=read.size("kv_lora_rank"),
        qk_nope_head_dim=read.size("qk_nope_head_dim"),
        qk_rope_head_dim=read.size("qk_rope_head_dim"),
        v_head_dim=read.size("v_head_dim"),
        q_lora_rank=None if read.get("q_lora_rank") is None else read.size("q_lora_rank"),
    )


def latent_scale(mla: MlaConfig, rope: RopeConfig | None) -> float:
    """What q.k is multiplied by: YaRN's temperature over all dimensions goes in here, squared."""
    scale = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5
    if rope is not None and rope.mscale_all_dim and rope.factor > 1:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    return scale


def parse_window(family: Family, read: ConfigReader, layers: int) -> tuple[int | None, tuple[bool, ...]]:
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
