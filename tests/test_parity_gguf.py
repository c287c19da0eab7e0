"""GGUF files against the folders they are made from: names, permutations, baked offsets and metadata all undone again.

The writer below does to a tiny model what llama.cpp's converter does to a real one. The folder's logits are compared
with transformers in test_parity.py, so equal here means equal there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tiny_models import Tiny, tiny_config_dicts

import flashinfer_cli as fc
from flashinfer_cli.checkpoint.rows import read_rows
from flashinfer_cli.config import ModelConfig, WeightRef
from flashinfer_cli.models.names import GGUF_LAYER, GGUF_MODEL, GGUF_PARALLEL_LAYER
from flashinfer_cli.models.open import OpenModel, open_model

ARCH = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
    "phi": "phi2", "phi3": "phi3", "falcon": "falcon", "nemotron": "nemotron", "arcee": "arcee", "mixtral": "llama",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe",
}  # fmt: skip
PERMUTED = ("llama", "arcee")


def writable(family: str, dictionary: dict[str, Any]) -> bool:
    """Whether llama.cpp could say this configuration in metadata as the writer below does."""
    rope = dictionary.get("rope_parameters") or {}
    plain = rope.get("rope_type", "default") in ("default", "linear")
    nested = rope.get("full_attention", {}).get("rope_type", "default")
    # No key says these: a head's norm, windows by layer of qwen, dense layers among experts.
    odd = any(dictionary.get(key) for key in ("qk_layernorm", "use_sliding_window", "mlp_only_layers"))
    odd |= dictionary.get("decoder_sparse_step", 1) != 1
    odd |= dictionary.get("hidden_act", "silu") not in USUAL.get(family, ("silu",))
    odd |= family == "mixtral" and bool(dictionary.get("sliding_window"))
    return plain and not odd and nested == "default"


USUAL = {
    "gemma": ("gelu_pytorch_tanh", "silu", "gelu"), "phi": ("silu", "gelu_new"),
    "nemotron": ("silu", "relu2"), "arcee": ("silu", "relu2"),
}  # fmt: skip


def cases() -> list[tuple[str, int]]:
    found = []
    for family in ARCH:
        usable = [i for i, d in enumerate(tiny_config_dicts()[family]) if writable(family, d)]
        found += [(family, i) for i in usable[:2]]
    return found


def floats(model: OpenModel, ref: WeightRef) -> np.ndarray:
    info = model.checkpoint.tensors[ref.tensor]
    assert info.format == "F32"
    return np.array(read_rows(info, ref.row, ref.rows)).view(np.float32).reshape(ref.rows, ref.cols)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: pairs (j, j + d/2) become neighbours."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def metadata(writer: gguf.GGUFWriter, arch: str, config: ModelConfig) -> None:
    whole = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
    }  # fmt: skip
    eps = "attention.layer_norm_epsilon" if config.norm == "layer" else "attention.layer_norm_rms_epsilon"
    real = {eps: config.norm_eps, "attn_logit_softcapping": config.attn_logit_softcap}
    real |= {"final_logit_softcapping": config.final_logit_softcap, "attention.clamp_kqv": config.clip_qkv}
    if config.rope is not None:
        whole["rope.dimension_count"] = config.rope.rotary_dim
        real["rope.freq_base"] = config.rope.theta
        if config.rope.rope_type == "linear":
            writer.add_string(f"{arch}.rope.scaling.type", "linear")
            real["rope.scaling.factor"] = config.rope.factor
    if config.rope_local is not None:
        real["rope.freq_base_swa"] = config.rope_local.theta
    if arch.startswith("gemma") and config.attention_scale is not None:
        real["attention.scale"] = config.attention_scale
    if config.sliding_window and any(config.sliding_layers):
        whole["attention.sliding_window"] = config.sliding_window
        if not all(config.sliding_layers):
            writer.add_array(f"{arch}.attention.sliding_window_pattern", [bool(s) for s in config.sliding_layers])
    if config.moe is not None:
        whole |= {"expert_count": config.moe.num_experts, "expert_used_count": config.moe.num_experts_per_tok}
        whole["expert_feed_forward_length"] = config.moe.moe_intermediate_size
        writer.add_bool(f"{arch}.expert_weights_norm", config.moe.norm_topk_prob)
    for key, value in whole.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for key, number in real.items():
        if number is not None:
            writer.add_float32(f"{arch}.{key}", number)


def tensors(model: OpenModel, arch: str) -> dict[str, np.ndarray]:
    """GGUF name -> array, as the converter would make them."""
    config, found = model.config, {}
    tied = model.weights.model["head"] == model.weights.model["embed"]
    for role, ref in model.weights.model.items():
        if role == "head" and tied:
            continue
        base, _, bias = role.partition(".")
        found[f"{GGUF_MODEL[base][0]}.{bias or 'weight'}"] = (role, floats(model, ref))
    for index, roles in enumerate(model.weights.layers):
        experts: dict[str, list[np.ndarray]] = {}
        names = GGUF_PARALLEL_LAYER if config.parallel_block and "ffn_norm" in roles else GGUF_LAYER
        for role, ref in roles.items():
            values = floats(model, ref)
            if role.startswith("experts."):
                _, _, part = role.split(".")
                experts.setdefault(part, []).append(values)
                continue
            base, bias = (role.removesuffix(".bias"), "bias") if role.endswith(".bias") else (role, "weight")
            if base in ("q", "k") and arch in PERMUTED:
                heads = config.num_attention_heads if base == "q" else config.num_key_value_heads
                values = permuted(values.reshape(-1, ref.cols if bias == "weight" else 1), heads).reshape(values.shape)
            if base == "qkv" and config.qkv_layout == "grouped":
                per_kv = values.reshape(
                    config.num_key_value_heads, -1, config.head_dim, values.shape[-1] if bias == "weight" else 1
                )
                parts = per_kv[:, :-2], per_kv[:, -2:-1], per_kv[:, -1:]
                values = np.concatenate([p.reshape(-1, p.shape[-1]) for p in parts]).reshape(values.shape)
            found[f"blk.{index}.{names[base][0]}.{bias}"] = (role, values)
        for part, matrices in experts.items():
            found[f"blk.{index}.ffn_{part}_exps.weight"] = (part, np.stack(matrices))
        if (
            "gate" in roles and roles["gate"].tensor == roles["up"].tensor
        ):  # phi3: one tensor of both, under the name of up
            gate = found.pop(f"blk.{index}.ffn_gate.weight")[1]
            name = f"blk.{index}.ffn_up.weight"
            found[name] = ("up", np.concatenate([gate, found[name][1]]))
    return {
        name: (values.reshape(-1) if "norm" in role or name.endswith(".bias") or role == "shared_gate" else values)
        + (config.norm_offset if "norm" in role and not name.endswith(".bias") else 0)
        for name, (role, values) in found.items()
    }


def write(model: OpenModel, arch: str, path: Path, kind: Kind = Kind.F32) -> dict[str, np.ndarray]:
    """Write the file; returns what it holds, dequantised."""
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, arch, model.config)
    held = {}
    for name, values in tensors(model, arch).items():
        if kind is Kind.F32 or values.ndim < 2 or "gate_inp" in name:
            held[name] = np.ascontiguousarray(values, dtype=np.float32)
            writer.add_tensor(name, held[name])
        else:
            blocks = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), kind)
            held[name] = gguf.quants.dequantize(blocks, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


IDS = [47, 68, 25, 118, 67, 83, 3, 0, 9, 127, 14, 77, 5, 6, 31, 40]


@pytest.mark.parametrize(("family", "index"), cases(), ids=lambda value: str(value))
def test_gguf_equals_the_folder(family: str, index: int, tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = tiny(family, index)
    opened = open_model(folder)
    path = tmp_path / "model.gguf"
    write(opened, ARCH[family], path)
    with fc.load(folder, context=16) as engine:
        expected = engine.logits(IDS)
    with fc.load(path, context=16, stream="always") as engine:
        assert (engine.logits(IDS) - expected).abs().max() < 1e-4
    fc.bundle(path, tmp_path / "bundle")
    with fc.load(tmp_path / "bundle", context=16, stream="always") as engine:
        assert (engine.logits(IDS) - expected).abs().max() < 1e-4
        assert engine.report().exactness == "exact"


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize(("family", "index"), [("llama", 0), ("olmoe", 0)])
def test_quantised_files_compute_what_they_hold(
    family: str, index: int, kind: Kind, tiny: Tiny, tmp_path: Path
) -> None:
    """Against a plain file of the dequantised weights; and a bundle of it keeps them."""
    folder, _ = tiny(family, index)
    opened = open_model(folder)
    held = write(opened, ARCH[family], tmp_path / "quantised.gguf", kind)
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", ARCH[family])
    metadata(writer, ARCH[family], opened.config)
    for name, values in held.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = []
    for name in ("plain.gguf", "quantised.gguf"):
        with fc.load(tmp_path / name, context=16, stream="always", kv_cache_type="f32") as engine:
            found.append(engine.logits(IDS))
    assert (found[0] - found[1]).abs().max() < 1e-4
    fc.bundle(tmp_path / "quantised.gguf", tmp_path / "bundle")
    with fc.load(tmp_path / "bundle", context=16, kv_cache_type="f32") as engine:
        assert engine.report().exactness == "exact"  # blocks stay as they are
        assert torch.allclose(engine.logits(IDS), found[1], atol=1e-4)
