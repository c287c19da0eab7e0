"""A folder of deepseek_v2 or gpt_oss as the GGUF file that llama.cpp's converter makes of it.

Names are gguf's own (`get_tensor_name_map`), keys and arithmetic those of conversion/deepseek.py and gpt_oss.py there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray]
ARCH = {"deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2, "gpt_oss": gguf.MODEL_ARCH.GPT_OSS}


def blocks_of(pairs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 [..., groups, 16] of neighbours and [..., groups] -> ggml's blocks, uint8 [..., 17 * groups]."""
    values = np.stack((pairs & 15, pairs >> 4), -1).reshape(*pairs.shape[:-1], 32)
    halves = values[..., :16] | (values[..., 16:] << 4)
    return np.concatenate((scales[..., None], halves), -1).reshape(*pairs.shape[:-2], -1)


def _keys(config: dict[str, Any], split: bool) -> dict[str, Any]:
    """Without the architecture in front. `split`: as files say it whose kv_b is two tensors."""
    rope = config["rope_parameters"]
    keys = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"], "vocab_size": config["vocab_size"],
        "attention.head_count_kv": config["num_key_value_heads"], "rope.freq_base": rope["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "expert_used_count": config["num_experts_per_tok"],
    }  # fmt: skip
    if rope["rope_type"] == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]),
                 "rope.scaling.original_context_length": rope["original_max_position_embeddings"]}  # fmt: skip
        keys |= {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if key in rope}
    if config["model_type"] == "gpt_oss":
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        usual = [layer % 2 == 0 for layer in range(len(slides))]
        return keys | {
            "attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"],
            "attention.sliding_window": config["sliding_window"], "expert_count": config["num_local_experts"],
            "expert_feed_forward_length": config["intermediate_size"],
        } | ({} if slides == usual else {"attention.sliding_window_pattern": slides})  # fmt: skip
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    whole, value = config["qk_nope_head_dim"] + turned, config["v_head_dim"]
    keys |= {
        "leading_dense_block_count": config["first_k_dense_replace"], "attention.kv_lora_rank": rank,
        "expert_feed_forward_length": config["moe_intermediate_size"], "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"], "rope.dimension_count": turned,
        "expert_weights_scale": float(config["routed_scaling_factor"]),
    }  # fmt: skip
    if config["q_lora_rank"]:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    if config["n_group"]:
        keys |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if "mscale_all_dim" in rope:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if not split:
        return keys | {"attention.key_length": whole, "attention.value_length": value}
    return keys | {
        "attention.head_count_kv": 1, "attention.key_length": rank + turned, "attention.value_length": rank,
        "attention.key_length_mla": whole, "attention.value_length_mla": value,
    }  # fmt: skip


def _deepseek(tensors: Tensors, config: dict[str, Any], split: bool) -> Iterator[tuple[str, np.ndarray]]:
    experts: dict[str, list[np.ndarray]] = {}
    for name, values in sorted(tensors.items()):
        before, found, after = name.partition(".mlp.experts.")
        if found:  # "0.up_proj.weight"
            experts.setdefault(f"{before}{found}{after.partition('.')[2]}", []).append(values)
        elif split and name.endswith("kv_b_proj.weight"):
            nope, heads = config["qk_nope_head_dim"], config["num_attention_heads"]
            both = values.reshape(heads, -1, values.shape[-1])
            yield name.replace("kv_b_proj", "k_b_proj"), both[:, :nope].transpose(0, 2, 1)
            yield name.replace("kv_b_proj", "v_b_proj"), both[:, nope:]
        else:
            yield name, values
    yield from ((name, np.stack(each)) for name, each in experts.items())


def _gpt_oss(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    for name, values in tensors.items():
        layer, found, part = name.partition(".mlp.experts.")
        if not found:
            yield name + (".weight" if name.endswith("sinks") else ""), values
            continue
        if part.endswith("_scales"):
            continue
        proj, suffix = part.partition("_proj")[::2]
        if suffix == "_blocks":
            values, suffix = blocks_of(values, tensors[f"{layer}{found}{proj}_proj_scales"]), "weight"
        elif suffix == "":
            values, suffix = values.swapaxes(1, 2), "weight"
        pieces = {"gate": values[:, ::2], "up": values[:, 1::2]} if proj == "gate_up" else {proj: values}
        for each, rows in pieces.items():
            yield f"{layer}{found}{each}_proj.{suffix.lstrip('_')}", rows


def convert(folder: Path, path: Path, kind: Kind = Kind.F32, *, split: bool = True, **keys: Any) -> Tensors:
    """Write the file; returns what it holds, dequantised. Matrices become `kind` where their columns allow it, else
    F16 as the converter has it; `keys` are added, with __ for a dot, and None takes one away."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    arch = ARCH[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    said = _keys(config, split) | {key.replace("__", "."): value for key, value in keys.items()}
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
              list: writer.add_array}  # fmt: skip
    for key, value in said.items():
        if value is not None:
            adders[type(value)](f"{gguf.MODEL_ARCH_NAMES[arch]}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "none")
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    oss = config["model_type"] == "gpt_oss"
    held = {}
    for name, values in _gpt_oss(tensors) if oss else _deepseek(tensors, config, split):
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        held[new] = _add(writer, new, np.ascontiguousarray(values), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> np.ndarray:
    if values.dtype == np.uint8:
        writer.add_tensor(name, values, raw_dtype=Kind.MXFP4)
        return gguf.quants.dequantize(values, Kind.MXFP4)
    if kind is Kind.F32 or values.ndim < 2 or name.endswith(".bias") or "ffn_gate_inp" in name:
        writer.add_tensor(name, values.astype(np.float32))
        return values.astype(np.float32)
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F16
    blocks = gguf.quants.quantize(values.astype(np.float32), kind)
    writer.add_tensor(name, blocks, raw_dtype=kind)
    return gguf.quants.dequantize(blocks, kind)
