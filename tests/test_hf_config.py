"""What a model is: config.json, in old words and new, read as transformers reads it, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from tiny_models import Tiny

from flashinfer_cli.errors import CorruptCheckpointError, UnsupportedModelError
from flashinfer_cli.models.families import FAMILIES
from flashinfer_cli.models.hf_config import parse_config

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 8,
}  # fmt: skip
OURS = {"mixture_of_depths", "moe_lstm"}  # transformers has none: tests/test_mixture_of_depths.py, test_recurrent.py


def test_every_family_has_tiny_models() -> None:
    configs = tiny_models.tiny_config_dicts()
    assert set(configs) == set(FAMILIES) - OURS
    assert all(len(each) >= 2 for each in configs.values())


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
def test_old_spellings_mean_the_same(tiny: Tiny, family: str, index: int) -> None:
    config = json.loads((tiny(family, index)[0] / "config.json").read_text())
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


def test_tiny_models_are_not_degenerate(tiny: Tiny) -> None:
    ids = torch.randint(0, tiny_models.VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    for family, index in tiny_models.cases():
        with torch.no_grad():
            logits = tiny(family, index)[1](ids, use_cache=False).logits[0]
        assert logits.std() < 20, (family, index)
        assert logits.std(0).mean() > 0.5, (family, index)  # from one position to the next
