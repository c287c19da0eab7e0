"""RoPE as a config.json describes it, in all of its spellings, read into `RopeConfig`.

Old files say `rope_theta`, `rope_scaling` (with `type` or `rope_type`) and `partial_rotary_factor` at the top; new ones
put all of it into `rope_parameters`, nested by layer type where layers differ. GGUF metadata add `rope_interleaved`,
`rope_freqs`, `short_factor`, `long_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import RopeConfig
from ..errors import CorruptCheckpointError, UnsupportedModelError, nearest
from .family import Family

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_STRETCHED = ("llama3", "yarn", "longrope")  # those that need to know the context before stretching
_RENAMED = {"su": "longrope", "none": "default"}
FULL, SLIDING = "full_attention", "sliding_attention"


def number(
    params: Mapping[str, Any], key: str, where: str, default: float | None = None, *, least: float = 0.0
) -> float:
    """`params[key]` as a finite float above `least`. Raises CorruptCheckpointError naming the key."""
    value = params.get(key, default)
    if value is None:
        value = default
    if value is None:
        raise CorruptCheckpointError(f"The config's {where} lacks '{key}'.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= least:
        raise CorruptCheckpointError(
            f"The config's {where} has '{key}' = {value!r}, which must be a number above {least:g}."
        )
    return float(value)


def _factors(params: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    values = params.get(key)
    if values is None:
        raise CorruptCheckpointError(f"The config's longrope scaling lacks '{key}'.")
    if not isinstance(values, list | tuple) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
        raise CorruptCheckpointError(
            f"The config's '{key}' has {found}; RoPE over {2 * count} dimensions needs {count}."
        )
    return tuple(number({key: value}, key, "RoPE scaling") for value in values)


def _object(holder: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`holder[key]`, an object; empty where it is absent or null."""
    value = holder.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise CorruptCheckpointError(f"The config's '{key}' is {value!r}, not an object.")
    return dict(value or {})


def _optional(params: Mapping[str, Any], key: str, default: float | None, where: str) -> float | None:
    return default if params.get(key) is None else number(params, key, where, least=-1e-30)


def _rope_type(params: Mapping[str, Any], model_type: str) -> str:
    name = params.get("rope_type", params.get("type")) or "default"
    name = _RENAMED.get(name, name) if isinstance(name, str) else repr(name)
    if name == "yarn" and model_type == "phi3":
        name = "longrope"  # early phi3 files call it so
    if name not in ROPE_TYPES:
        near = nearest(str(name), ROPE_TYPES)
        raise UnsupportedModelError(
            f"The RoPE type '{name}' is not supported.", f"The nearest one that is: '{near}'." if near else None
        )
    return str(name)


def _read(
    family: Family, config: Mapping[str, Any], params: Mapping[str, Any], theta: float, head_dim: int
) -> RopeConfig:
    """One RoPE from its own parameters; `config` gives what older files keep at the top."""
    where = "RoPE scaling"
    share = 1.0
    if family.partial_rotary is not None:
        default = config.get("partial_rotary_factor")
        share = number(params, "partial_rotary_factor", "config", family.partial_rotary if default is None else default)
    rotary_dim = int(head_dim * share)
    if config.get("rotary_dim") is not None:
        rotary_dim = int(number(config, "rotary_dim", "config"))
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise CorruptCheckpointError(
            f"The config's 'partial_rotary_factor' turns {rotary_dim} of the {head_dim} dimensions of a head; "
            f"it must be an even number of at least 2 and at most {head_dim}."
        )
    context = int(number(config, "max_position_embeddings", "config", family.defaults["max_position_embeddings"]))
    interleaved = bool(config.get("rope_interleaved", family.interleaved_rope))
    freqs = config.get("rope_freqs") or ()
    if freqs:
        freqs = _factors({"rope_freqs": freqs}, "rope_freqs", rotary_dim // 2)

    kind = _rope_type(params, family.model_type)
    if kind == "default" and config.get("long_factor") and config.get("short_factor"):
        kind = "longrope"
    if freqs and kind == "llama3":
        kind = "default"  # the divisors are what llama3's rule gives
    original: int | None = None
    if kind in _STRETCHED:
        # As transformers has it: the key at the top wins over the one among the parameters, phi3's default included.
        top = config.get("original_max_position_embeddings", family.defaults.get("original_max_position_embeddings"))
        source = config if top is not None else params
        original = int(number(source, "original_max_position_embeddings", "config", top or context, least=1.0))
    rope: dict[str, Any] = {"theta": theta, "rope_type": kind, "rotary_dim": rotary_dim, "interleaved": interleaved,
            "max_position_embeddings": context, "original_max_position_embeddings": original,
            "freq_factors": freqs}  # fmt: skip
    match kind:
        case "linear" | "dynamic":
            if kind == "dynamic" and rotary_dim == 2:
                raise CorruptCheckpointError("Dynamic RoPE scaling needs more than two rotary dimensions a head.")
            rope |= {"factor": number(params, "factor", where)}
        case "llama3":
            low = number(params, "low_freq_factor", where)
            high = number(params, "high_freq_factor", where)
            if high <= low:
                raise CorruptCheckpointError(f"The config's RoPE 'high_freq_factor' {high:g} is not above {low:g}.")
            rope |= {"factor": number(params, "factor", where), "low_freq_factor": low, "high_freq_factor": high}
        case "yarn":
            assert original is not None
            rope |= {
                "factor": number(params, "factor", where, context / original),
                "beta_fast": _optional(params, "beta_fast", None, where) or 32.0,
                "beta_slow": _optional(params, "beta_slow", None, where) or 1.0,
                "attention_factor": _optional(params, "attention_factor", None, where),
                "mscale": _optional(params, "mscale", None, where),
                "mscale_all_dim": _optional(params, "mscale_all_dim", None, where),
                "truncate": bool(params.get("truncate", True)),
            }
        case "longrope":
            assert original is not None
            lists = {**{key: config.get(key) for key in ("short_factor", "long_factor")}, **params}
            rope |= {
                "factor": number(params, "factor", where, context / original),
                "attention_factor": _optional(params, "attention_factor", None, where),
                "short_factor": _factors(lists, "short_factor", rotary_dim // 2),
                "long_factor": _factors(lists, "long_factor", rotary_dim // 2),
            }
    return RopeConfig(**rope)


def parse_rope(family: Family, config: Mapping[str, Any], head_dim: int) -> tuple[RopeConfig | None, RopeConfig | None]:
    """(rope of all layers or the full-attention ones, that of the sliding ones where it differs), or (None, None)."""
    if not family.rotary:
        return None, None
    scaling, nested = _object(config, "rope_scaling"), _object(config, "rope_parameters")
    theta = number(config, "rope_theta", "config", family.defaults.get("rope_theta", 10_000.0))
    if not family.local_rope:
        said = "rope_scaling" in config or config.get("rope_parameters") is not None
        params = scaling or nested or ({} if said else _object(family.defaults, "rope_parameters"))
        params = _object(params, FULL) or params
        return _read(family, config, params, number(params, "rope_theta", "config", theta), head_dim), None

    full, local = (_object(nested, kind) | _object(scaling, kind) for kind in (FULL, SLIDING))
    for flat in (nested, scaling):  # not by layer type: the old way, which means the full-attention layers
        if FULL not in flat and SLIDING not in flat:
            full |= flat
    local_theta = number(config, "rope_local_base_freq", "config", family.defaults["rope_local_base_freq"])
    plain = {key: value for key, value in config.items() if key not in ("rope_freqs", "short_factor", "long_factor")}
    return (
        _read(family, config, full, number(full, "rope_theta", "config", theta), head_dim),
        _read(family, plain, local, number(local, "rope_theta", "config", local_theta), head_dim),
    )
