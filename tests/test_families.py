"""What a model is: config.json read as transformers reads it, and every tensor given its role or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors import safe_open

from flashinfer_cli.checkpoint.base import TensorInfo
from flashinfer_cli.config import ModelConfig, WeightMap, WeightRef
from flashinfer_cli.errors import CorruptCheckpointError, UnsupportedModelError
from flashinfer_cli.models.families import FAMILIES
from flashinfer_cli.models.hf_config import parse_config
from flashinfer_cli.models.names import GGUF_LAYER, GGUF_MODEL
from flashinfer_cli.models.weights import weight_map

Tensors = dict[str, TensorInfo]
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 8,
}  # fmt: skip

NO_GGUF = ("opt", "deepseek_v2", "gpt_oss")  # their names there are not known to us
OURS = {"mixture_of_depths", "moe_lstm"}  # transformers has none: tests/test_mixture_of_depths.py, test_recurrent.py


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
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[dict[str, Any], Tensors]]:
    found = {}
    for family, index in tiny_models.cases():
        folder, _ = tiny_models.make(family, index, tmp_path_factory.mktemp(family))
        found[family, index] = json.loads((folder / "config.json").read_text()), _saved_table(folder)
    return found


Saved = dict[tuple[str, int], tuple[dict[str, Any], Tensors]]

# ------------------------------------------------------------------ config.json


def test_every_family_has_tiny_models() -> None:
    tiny = tiny_models.tiny_config_dicts()
    assert set(tiny) == set(FAMILIES) - OURS
    assert all(len(configs) >= 2 for configs in tiny.values())


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


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - OURS))
def test_what_a_config_omits_is_what_transformers_assumes(family: str) -> None:
    """A config with the sizes alone, against the one transformers completes it to."""
    words = SIZES | {"hidden_size": 256, "num_attention_heads": 32}
    sizes = {FAMILIES[family].key(word): value for word, value in words.items()}
    if family == "deepseek_v2":
        sizes["num_experts_per_tok"] = 2  # transformers has no default that would run
    completed = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    completed |= {"model_type": family}
    assert parse_config({"model_type": family, **sizes}) == parse_config(completed)


def _in_old_words(config: dict[str, Any]) -> dict[str, Any]:
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = config["dtype"]
    if config["model_type"] == "gpt_oss":  # is younger than its layer_types
        old["layer_types"] = config["layer_types"]
    parameters = dict(config.get("rope_parameters") or {})
    local = parameters.pop("sliding_attention", None)
    parameters = dict(parameters.pop("full_attention", None) or parameters)
    if local is not None:
        old |= {"rope_local_base_freq": local["rope_theta"], "layer_types": config["layer_types"]}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in parameters:
            old[key] = parameters.pop(key)
    kind = parameters.pop("rope_type", "default")
    if kind == "longrope" and config["model_type"] == "phi3":
        kind = "su"
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    return old


@pytest.mark.parametrize(("family", "index"), tiny_models.cases())
def test_old_spellings_mean_the_same(saved: Saved, family: str, index: int) -> None:
    config, _ = saved[family, index]
    assert parse_config(_in_old_words(config)) == parse_config(config)


def test_sliding_windows_follow_each_family() -> None:
    def layers(family: str, **more: Any) -> tuple[bool, ...]:
        parsed = parse_config({"model_type": family, **SIZES, "num_key_value_heads": 4, **more})
        return tuple(parsed.is_sliding(i) for i in range(parsed.num_hidden_layers))

    none, every = (False,) * 6, (True,) * 6
    on = {"use_sliding_window": True}
    assert layers("llama", sliding_window=7) == none
    assert layers("mistral") == every
    assert layers("mistral", sliding_window=None) == none
    assert layers("mixtral") == none
    assert layers("mixtral", sliding_window=7) == every
    assert layers("phi3", sliding_window=7) == every
    assert layers("qwen2", sliding_window=7) == none
    assert layers("qwen2", sliding_window=7, max_window_layers=4, **on) == (False,) * 4 + (True,) * 2
    assert layers("qwen2", sliding_window=7, layer_types=["sliding_attention", *["full_attention"] * 5], **on)[0]
    assert layers("qwen2_moe", max_window_layers=4, **on) == (True, False, True, False, False, False)
    assert layers("qwen3_moe", sliding_window=7, **on) == every
    assert layers("gemma2") == (True, False) * 3
    assert layers("gemma3_text") == (True,) * 5 + (False,)
    assert layers("gemma3_text", sliding_window_pattern=3) == (True, True, False) * 2


def test_published_shapes() -> None:
    """The parts of well-known config.json files that differ from llama's."""
    falcon = {"model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
              "num_attention_heads": 71, "layer_norm_epsilon": 1e-5, "eos_token_id": 11, "multi_query": True,
              "alibi": False, "parallel_attn": True, "bias": False, "torch_dtype": "bfloat16"}  # fmt: skip
    parsed = parse_config(falcon)
    assert (parsed.num_key_value_heads, parsed.head_dim, parsed.intermediate_size) == (1, 64, 18176)
    assert (parsed.parallel_block, parsed.shared_norm, parsed.qkv_layout, parsed.dtype) == (
        True,
        True,
        "grouped",
        "BF16",
    )

    opt_350m = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False,
                "_remove_final_layer_norm": False, "max_position_embeddings": 2048}  # fmt: skip
    parsed = parse_config(opt_350m)
    assert (parsed.embed_size, parsed.norm_first, parsed.final_norm, parsed.position_offset) == (512, False, False, 2)
    assert parsed.rope is None
    assert parsed.tie_word_embeddings

    gemma3_4b = {"model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16",
                 "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                                 "num_hidden_layers": 34, "sliding_window": 1024,
                                 "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}  # fmt: skip
    parsed = parse_config(gemma3_4b)
    assert (parsed.num_attention_heads, parsed.head_dim, parsed.vocab_size) == (8, 256, 262208)
    assert (parsed.eos_token_ids, parsed.dtype, parsed.tie_word_embeddings) == ((1, 106), "BF16", True)
    full, local = parsed.rope_of(5), parsed.rope_of(0)
    assert full is not None
    assert local is not None
    assert (full.theta, full.factor, full.rope_type) == (1e6, 8.0, "linear")
    assert (local.theta, local.rope_type) == (1e4, "default")

    llama31 = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 131072,
               "rope_theta": 500000.0, "eos_token_id": [128001, 128008],
               "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 8192, "rope_type": "llama3"}}  # fmt: skip
    rope = parse_config(llama31).rope
    assert rope is not None
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings, rope.theta) == (
        "llama3",
        8.0,
        8192,
        5e5,
    )

    gemma_2b = parse_config(
        {"model_type": "gemma", **SIZES, "num_key_value_heads": 1, "head_dim": 256, "hidden_act": "gelu"}
    )
    assert (gemma_2b.hidden_act, gemma_2b.norm_offset, gemma_2b.embedding_scale) == ("gelu_tanh", 1.0, 8.0)
    assert parse_config({"model_type": "llama", **SIZES, "hidden_act": "relu"}).hidden_act == "relu"


def test_quirks_of_gguf_metadata() -> None:
    base = {"model_type": "llama", **SIZES, "rope_interleaved": True}
    divisors = [1.0, 2.0, 4.0, 8.0]
    rope = parse_config({**base, "rope_freqs": divisors}).rope
    assert rope is not None
    assert (rope.interleaved, rope.rope_type, rope.freq_factors) == (True, "default", tuple(divisors))
    rope = parse_config({**base, "rope_freqs": divisors, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}).rope  # fmt: skip
    assert rope is not None
    assert (rope.rope_type, len(rope.freq_factors)) == ("default", 4)
    assert (
        parse_config({"model_type": "gemma", **SIZES, "num_key_value_heads": 8, "norm_offset_baked": True}).norm_offset
        == 0.0
    )
    assert parse_config({"model_type": "falcon", **SIZES, "qkv_layout": "split"}).qkv_layout == "split"
    phi3 = {
        "model_type": "phi3",
        **SIZES,
        "max_position_embeddings": 8192,
        "long_factor": divisors,
        "short_factor": [1] * 4,
    }
    rope = parse_config(phi3).rope
    assert rope is not None
    assert (rope.rope_type, rope.long_factor, rope.short_factor, rope.factor) == (
        "longrope",
        tuple(divisors),
        (1.0,) * 4,
        2.0,
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "lama"}, UnsupportedModelError, ["'lama'", "'llama'"]),
        ({"model_type": "mamba2"}, UnsupportedModelError, ["'mamba2'"]),
        ({"model_type": None}, CorruptCheckpointError, ["model_type"]),
        ({"hidden_act": "sillu"}, UnsupportedModelError, ["'sillu'", "'silu'", "hidden_act"]),
        ({"rope_scaling": {"type": "lnear", "factor": 2.0}}, UnsupportedModelError, ["'lnear'", "'linear'"]),
        ({"rope_scaling": {"type": "linear"}}, CorruptCheckpointError, ["factor"]),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, CorruptCheckpointError, ["factor", "-1.0"]),
        ({"rope_scaling": "linear"}, CorruptCheckpointError, ["rope_scaling", "linear"]),
        ({"rope_scaling": {"type": ["linear"]}}, UnsupportedModelError, ["RoPE type", "linear"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, CorruptCheckpointError,
         ["full_attention"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, CorruptCheckpointError, ["low_freq_factor"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
         CorruptCheckpointError, ["short_factor", "4"]),
        ({"hidden_size": None}, CorruptCheckpointError, ["hidden_size"]),
        ({"vocab_size": ...}, CorruptCheckpointError, ["vocab_size"]),
        ({"num_attention_heads": 0}, CorruptCheckpointError, ["num_attention_heads", "0"]),
        ({"num_hidden_layers": -3}, CorruptCheckpointError, ["num_hidden_layers", "-3"]),
        ({"num_hidden_layers": 10**9}, CorruptCheckpointError, ["num_hidden_layers"]),
        ({"num_hidden_layers": "six"}, CorruptCheckpointError, ["num_hidden_layers", "six"]),
        ({"intermediate_size": True}, CorruptCheckpointError, ["intermediate_size"]),
        ({"num_key_value_heads": 3}, CorruptCheckpointError, ["num_key_value_heads", "3"]),
        ({"hidden_size": 65}, CorruptCheckpointError, ["hidden_size", "65"]),
        ({"head_dim": 7}, CorruptCheckpointError, ["partial_rotary_factor", "7"]),
        ({"rms_norm_eps": "small"}, CorruptCheckpointError, ["rms_norm_eps"]),
        ({"eos_token_id": "</s>"}, CorruptCheckpointError, ["eos_token_id"]),
        ({"model_type": "falcon", "alibi": True}, UnsupportedModelError, ["alibi"]),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, CorruptCheckpointError, ["num_experts_per_tok", "9"]),
        ({"model_type": "mixtral", "num_local_experts": 0}, CorruptCheckpointError, ["num_local_experts"]),
        ({"model_type": "gemma2", "num_key_value_heads": 4, "layer_types": ["full_attention"]},
         CorruptCheckpointError, ["layer_types"]),
        ({"model_type": "gemma2", "layer_types": ["mamba"] * 6}, UnsupportedModelError, ["mamba"]),
        ({"model_type": "phi", "partial_rotary_factor": 1.5}, CorruptCheckpointError, ["partial_rotary_factor"]),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModelError, ["awq"]),
        ({"use_bidirectional_attention": True}, UnsupportedModelError, ["bidirectional"]),
    ],
)  # fmt: skip
def test_bad_configs_are_named(change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    config = {"model_type": "llama", **SIZES, **change}
    with pytest.raises(error) as caught:
        parse_config({key: value for key, value in config.items() if value is not ...})
    said = f"{caught.value.message} {caught.value.hint or ''}"  # type: ignore[attr-defined]
    for word in words:
        assert word in said


def test_a_config_that_is_no_object() -> None:
    with pytest.raises(CorruptCheckpointError, match="object"):
        parse_config([])  # type: ignore[arg-type]


def test_tiny_models_are_not_degenerate() -> None:
    ids = torch.randint(0, tiny_models.VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    for family, index in tiny_models.cases():
        with torch.no_grad():
            logits = tiny_models.hf_model(family, index)(ids, use_cache=False).logits[0]
        assert logits.std() < 20, (family, index)
        assert logits.std(0).mean() > 0.5, (family, index)  # from one position to the next


# ------------------------------------------------------------------ tensors


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
def test_fused_experts_are_slices_of_rows(family: str, tmp_path: Path) -> None:
    """The layout transformers holds in memory, gate above up in each expert, against the one it saves."""
    folder, model = tiny_models.make(family, 0, tmp_path)
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


# ------------------------------------------------------------------ GGUF


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
