"""Every tensor of a checkpoint is given its role, under the names of its kind of file, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from tiny_models import Tiny

from flashinfer_cli.checkpoint.base import TensorInfo
from flashinfer_cli.config import ModelConfig, WeightMap, WeightRef
from flashinfer_cli.errors import CorruptCheckpointError, UnsupportedModelError
from flashinfer_cli.models.hf_config import parse_config
from flashinfer_cli.models.names import GGUF_LAYER, GGUF_MODEL
from flashinfer_cli.models.weights import weight_map

Tensors = dict[str, TensorInfo]
Saved = dict[tuple[str, int], tuple[dict[str, Any], Tensors]]
NO_GGUF = ("opt", "deepseek_v2", "gpt_oss")  # their names there are not known to us


def _info(name: str, *shape: int, fmt: str = "F32") -> TensorInfo:
    return TensorInfo(name, fmt, shape, Path("model.safetensors"), 0, 4 * prod(shape))


def _table(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: _info(name, *shape) for name, shape in shapes.items()}


def _saved_table(folder: Path) -> Tensors:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return _table({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118


def _all_refs(found: WeightMap) -> list[WeightRef]:
    return [ref for roles in (found.model, *found.layers) for ref in roles.values()]


def _rows_once(found: WeightMap, tensors: Tensors) -> None:
    """Every row of every tensor belongs to exactly one ref (a tied head has the embedding's)."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for ref in set(_all_refs(found)):
        rows.setdefault(ref.tensor, []).append((ref.row, ref.row + ref.rows))
    assert set(rows) == set(tensors)
    for name, spans in rows.items():
        spans.sort()
        ends = [0, *(end for _, end in spans)]
        assert [start for start, _ in spans] == ends[:-1], name
        assert ends[-1] * next(r.cols for r in _all_refs(found) if r.tensor == name) == prod(tensors[name].shape), name


@pytest.fixture(scope="module")
def saved(tiny: Tiny) -> Saved:
    found = {}
    for family, index in tiny_models.cases():
        folder, _ = tiny(family, index)
        found[family, index] = json.loads((folder / "config.json").read_text()), _saved_table(folder)
    return found


@pytest.mark.parametrize(("family", "index"), tiny_models.cases())
def test_saved_config_and_tensors_are_understood(saved: Saved, family: str, index: int) -> None:
    config, tensors = saved[family, index]
    parsed = parse_config(config)
    assert parsed.model_type == family
    assert parsed.dtype == "F32"
    assert parsed.eos_token_ids == (2,)
    found = weight_map(parsed, tensors, "safetensors")
    assert len(found.layers) == parsed.num_hidden_layers
    _rows_once(found, tensors)
    assert (found.model["head"] == found.model["embed"]) == parsed.tie_word_embeddings


def _tiny(family: str, saved: Saved, index: int = 0) -> tuple[ModelConfig, Tensors]:
    config, tensors = saved[family, index]
    return parse_config(config), dict(tensors)


def test_a_missing_tensor_is_named(saved: Saved) -> None:
    for family, lost in (("llama", "model.layers.1.mlp.up_proj.weight"), ("falcon", "transformer.ln_f.weight"),
                         ("qwen3_moe", "model.layers.1.mlp.experts.3.down_proj.weight"),
                         ("persimmon", "model.layers.0.self_attn.query_key_value.weight"),
                         ("gemma2", "model.embed_tokens.weight")):  # fmt: skip
        config, tensors = _tiny(family, saved)
        del tensors[lost]
        with pytest.raises(CorruptCheckpointError, match=lost.replace(".", r"\.")):
            weight_map(config, tensors, "safetensors")


def test_a_wrong_shape_is_named(saved: Saved) -> None:
    config, tensors = _tiny("llama", saved)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = _info(name, 33, 64)
    with pytest.raises(CorruptCheckpointError, match=r"k_proj\.weight' has shape \[33, 64\].*\[32, 64\]"):
        weight_map(config, tensors, "safetensors")


def test_tensors_without_a_place_are_refused(saved: Saved) -> None:
    config, tensors = _tiny("llama", saved)
    harmless = ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.encoder.weight")
    weight_map(config, tensors | _table(dict.fromkeys(harmless, (8,))), "safetensors")
    extra = ("model.layers.0.self_attn.q_proj.lora_A", "model.layers.9.mlp.up_proj.weight")
    with pytest.raises(UnsupportedModelError, match=r"lora_A' and 1 more"):
        weight_map(config, tensors | _table(dict.fromkeys(extra, (8, 8))), "safetensors")


def test_integer_weights_are_refused(saved: Saved) -> None:
    config, tensors = _tiny("llama", saved)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = _info(name, 96, 64, fmt="I8")
    with pytest.raises(UnsupportedModelError, match="I8"):
        weight_map(config, tensors, "safetensors")


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_prefixes_of_bare_and_wrapped_models(saved: Saved, prefix: str) -> None:
    for family in ("gemma3_text", "opt"):
        config, tensors = _tiny(family, saved)
        renamed = {prefix + name.removeprefix("model."): info for name, info in tensors.items()}
        found = weight_map(config, {n: _info(n, *info.shape) for n, info in renamed.items()}, "safetensors")
        assert {ref.tensor for ref in _all_refs(found)} == set(renamed)


def test_a_head_that_is_there_is_used_and_one_that_is_not_is_the_embedding(saved: Saved) -> None:
    config, tensors = _tiny("llama", saved)
    assert config.tie_word_embeddings
    both = tensors | _table({"lm_head.weight": (128, 64)})
    assert weight_map(config, both, "safetensors").model["head"].tensor == "lm_head.weight"
    only_head = {name: info for name, info in both.items() if "embed_tokens" not in name}
    found = weight_map(config, only_head, "safetensors").model
    assert found["embed"] == found["head"]
    config, tensors = _tiny("llama", saved, 1)
    assert not config.tie_word_embeddings
    del tensors["lm_head.weight"]
    assert weight_map(config, tensors, "safetensors").model["head"].tensor == "model.embed_tokens.weight"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_fused_experts_are_slices_of_rows(family: str, tiny: Tiny) -> None:
    """The layout transformers holds in memory, gate above up in each expert, against the one it saves."""
    folder, model = tiny(family, 0)
    parsed = parse_config(json.loads((folder / "config.json").read_text()))
    separate, fused = _saved_table(folder), dict(model.state_dict())
    if parsed.tie_word_embeddings:
        fused.pop("lm_head.weight")
    tensors = _table({name: tuple(weight.shape) for name, weight in fused.items()})
    found = weight_map(parsed, tensors, "safetensors")
    _rows_once(found, tensors)
    apart = weight_map(parsed, separate, "safetensors")
    assert found.layers[0].keys() == apart.layers[0].keys()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for role, ref in found.layers[1].items():
            whole = fused[ref.tensor].reshape(-1, ref.cols)
            assert torch.equal(
                whole[ref.row : ref.row + ref.rows], file.get_tensor(apart.layers[1][role].tensor).view(-1, ref.cols)
            )


def test_fused_gate_up_is_gate_then_up(saved: Saved) -> None:
    config, tensors = _tiny("phi3", saved)
    layer = weight_map(config, tensors, "safetensors").layers[0]
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert (layer["gate"], layer["up"]) == (WeightRef(name, 0, 96, 64), WeightRef(name, 96, 96, 64))
    assert layer["qkv"] == WeightRef("model.layers.0.self_attn.qkv_proj.weight", 0, 128, 64)


def test_gguf_names_are_those_of_the_gguf_package() -> None:
    from gguf.constants import TENSOR_NAMES

    known = {name.removeprefix("blk.{bid}.") for name in TENSOR_NAMES.values()}
    legacy = {"ffn_gate.{e}", "ffn_up.{e}", "ffn_down.{e}"}  # mixtral files before experts were fused
    ours = {name for names in (GGUF_MODEL, GGUF_LAYER) for group in names.values() for name in group}
    assert ours - legacy <= known


# For every tiny model, the names llama.cpp's converter gives; what it fuses is in the functions below.
_RENAMED = {
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "attn_post_norm": "post_attention_norm",
    "ffn_post_norm": "post_ffw_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv",
    "o": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down", "router": "ffn_gate_inp", "shared.gate": "ffn_gate_shexp", "shared.up": "ffn_up_shexp",
    "shared.down": "ffn_down_shexp", "shared_gate": "ffn_gate_inp_shexp",
}  # fmt: skip


def _gguf_table(config: ModelConfig, tensors: Tensors) -> Tensors:
    found = weight_map(config, tensors, "safetensors")
    shapes = {"token_embd.weight": (config.vocab_size, config.hidden_size), "output_norm.weight": (config.hidden_size,)}
    if found.model["head"] != found.model["embed"]:
        shapes["output.weight"] = shapes["token_embd.weight"]
    for role in ("final_norm.bias", "head.bias"):
        if role in found.model:
            shapes[{"final_norm.bias": "output_norm.bias"}.get(role, "output.bias")] = (found.model[role].cols,)
    swapped = (
        {"attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"}
        if config.parallel_block and not config.shared_norm
        else {}
    )
    for i, layer in enumerate(found.layers):
        for role, ref in layer.items():
            if role.startswith("experts."):
                if role.startswith("experts.0."):
                    part, count = role.split(".")[2], config.moe.num_experts if config.moe else 0
                    shapes[f"blk.{i}.ffn_{part}_exps.weight"] = (count, ref.rows, ref.cols)
                continue
            stem = role.removesuffix(".bias")
            suffix = "bias" if role.endswith(".bias") else "weight"
            name = f"blk.{i}.{swapped.get(stem, _RENAMED[stem])}.{suffix}"
            shapes[name] = (ref.cols,) if ref.rows == 1 else (ref.rows, ref.cols)
        if config.model_type == "phi3":  # its fused gate and up are one ffn_up
            del shapes[f"blk.{i}.ffn_gate.weight"]
            shapes[f"blk.{i}.ffn_up.weight"] = (2 * config.intermediate_size, config.hidden_size)
    return _table(shapes | {"rope_freqs.weight": (8,)})


@pytest.mark.parametrize(("family", "index"), [case for case in tiny_models.cases() if case[0] not in NO_GGUF])
def test_gguf_tensors_are_understood(saved: Saved, family: str, index: int) -> None:
    config, tensors = _tiny(family, saved, index)
    table = _gguf_table(config, tensors)
    found = weight_map(config, table, "gguf")
    del table["rope_freqs.weight"]
    _rows_once(found, table)
    theirs = weight_map(config, tensors, "safetensors")
    assert [layer.keys() for layer in found.layers] == [layer.keys() for layer in theirs.layers]
    if family == "falcon" and not config.shared_norm and config.parallel_block:
        assert found.layers[0]["attn_norm"].tensor == "blk.0.attn_norm_2.weight"
        assert found.layers[0]["ffn_norm"].tensor == "blk.0.attn_norm.weight"


def test_gguf_experts_apart(saved: Saved) -> None:
    config, tensors = _tiny("mixtral", saved)
    table = _gguf_table(config, tensors)
    for name in [name for name in table if "_exps" in name]:
        shape = table.pop(name).shape
        for e in range(shape[0]):
            one = name.replace("_exps", f".{e}")
            table[one] = _info(one, *shape[1:])
    found = weight_map(config, table, "gguf")
    assert found.layers[1]["experts.2.down"] == WeightRef("blk.1.ffn_down.2.weight", 0, 64, 96)
    del table["blk.1.ffn_down.2.weight"]
    with pytest.raises(CorruptCheckpointError, match=r"blk\.1\.ffn_down\.2"):
        weight_map(config, table, "gguf")
