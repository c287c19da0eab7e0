"""The configs that are made of a GGUF file's metadata, for every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writing import TENSORS, arch_keys, write

from flashinfer_cli.checkpoint.gguf import GgufCheckpoint
from flashinfer_cli.checkpoint.gguf_config import ARCHITECTURES
from flashinfer_cli.errors import CorruptCheckpointError, UnsupportedModelError

LATENT = {"rope.dimension_count": 8, "attention.kv_lora_rank": 32, "attention.key_length": 24,
          "attention.value_length": 16}  # fmt: skip


def config_of(
    tmp_path: Path, arch: str = "llama", keys: dict[str, Any] | None = None, **tensors: Any
) -> dict[str, Any]:
    named = {name.replace("__", "."): array for name, array in tensors.items()}
    path = write(tmp_path / "m.gguf", arch, keys, {**TENSORS, **named})
    made = GgufCheckpoint(path).config
    json.dumps(made)  # a bundle writes it as config.json
    return made


def test_llama(tmp_path: Path) -> None:
    keys = arch_keys(rope__freq_base=5e5, rope__dimension_count=8, vocab_size=10) | {
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.eom_token_id": 2,
    }  # fmt: skip
    config = config_of(tmp_path, keys=keys, rope_freqs__weight=np.array([1, 2, 4, 8], np.float32))
    eps = config.pop("rms_norm_eps")
    assert eps == pytest.approx(1e-5)
    assert config == {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "rope_theta": 5e5, "rotary_dim": 8, "rope_interleaved": True, "rope_freqs": [1.0, 2.0, 4.0, 8.0],
        "bos_token_id": 1, "eos_token_id": [2, 3], "tie_word_embeddings": False, "sliding_window": None,
        "dtype": "float32",
    }  # fmt: skip


def test_tied_when_there_is_no_output(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors={"token_embd.weight": TENSORS["token_embd.weight"]})
    assert GgufCheckpoint(path).config["tie_word_embeddings"] is True


def test_mixtral_comes_as_llama_with_experts(tmp_path: Path) -> None:
    up = np.zeros((4, 24, 32), np.float32)
    keys = arch_keys(expert_count=4, expert_used_count=2, feed_forward_length=24)
    config = config_of(tmp_path, keys=keys, blk__0__ffn_up_exps__weight=up)
    assert config["model_type"] == "mixtral"
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]) == (4, 2, 24)
    assert config["rope_interleaved"] is True


@pytest.mark.parametrize(("arch", "normed"), [("qwen2moe", False), ("qwen3moe", True), ("olmoe", False)])
def test_experts(tmp_path: Path, arch: str, normed: bool) -> None:
    tensors = {"blk__0__ffn_up_exps__weight": np.zeros((4, 12, 32), np.float32)}
    if arch == "qwen2moe":
        tensors["blk__0__ffn_up_shexp__weight"] = np.zeros((40, 32), np.float32)
    keys = arch_keys(expert_count=4, expert_used_count=2, attention__key_length=16, attention__value_length=16)
    config = config_of(tmp_path, arch, keys, **tensors)
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (4, 2, 12)
    assert config["norm_topk_prob"] is normed
    assert config["head_dim"] == 16
    assert config.get("shared_expert_intermediate_size") == (40 if arch == "qwen2moe" else None)
    assert "rope_interleaved" not in config


def test_widths_that_the_keys_say_win(tmp_path: Path) -> None:
    keys = arch_keys(expert_count=4, expert_used_count=2, expert_feed_forward_length=20,
                     expert_shared_feed_forward_length=44)  # fmt: skip
    shared = np.zeros((40, 32), np.float32)
    config = config_of(tmp_path, "qwen2moe", keys, blk__0__ffn_up_shexp__weight=shared)
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (20, 44)


def test_gemma2(tmp_path: Path) -> None:
    keys = arch_keys(attention__sliding_window=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                     attention__key_length=16)  # fmt: skip
    config = config_of(tmp_path, "gemma2", keys)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)
    assert config["query_pre_attn_scalar"] == 16
    assert config["norm_offset_baked"] is True
    big = config_of(tmp_path, "gemma2", keys | {".block_count": 46})
    assert big["query_pre_attn_scalar"] == 32 // 4


def test_gemma3_window_patterns_and_rope(tmp_path: Path) -> None:
    keys = arch_keys(attention__sliding_window=16, block_count=7, rope__freq_base=1e6, rope__scaling__type="linear",
                     rope__scaling__factor=8.0)  # fmt: skip
    config = config_of(tmp_path, "gemma3", keys)
    assert config["model_type"] == "gemma3_text"
    assert [kind == "full_attention" for kind in config["layer_types"]] == [False] * 5 + [True, False]
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    by_layer = [True, False, True, False, True, False, False]
    config = config_of(tmp_path, "gemma3", keys | {".attention.sliding_window_pattern": by_layer})
    assert [kind == "sliding_attention" for kind in config["layer_types"]] == by_layer
    with pytest.raises(CorruptCheckpointError, match="sliding_window_pattern"):
        config_of(tmp_path, "gemma3", keys | {".attention.sliding_window_pattern": [True, False]})


def test_phi3_longrope(tmp_path: Path) -> None:
    keys = arch_keys(rope__scaling__attn_factor=1.19, rope__scaling__original_context_length=16,
                     rope__dimension_count=8, attention__sliding_window=12)  # fmt: skip
    factors = {"rope_factors_long__weight": np.array([1, 2, 3, 4], np.float32),
               "rope_factors_short__weight": np.array([1, 1, 1, 1.5], np.float32)}  # fmt: skip
    config = config_of(tmp_path, "phi3", keys, **factors)
    assert config["long_factor"] == [1, 2, 3, 4]
    assert config["short_factor"] == [1, 1, 1, 1.5]
    assert config["rope_scaling"]["rope_type"] == "longrope"
    assert config["rope_scaling"]["attention_factor"] == pytest.approx(1.19)
    assert config["original_max_position_embeddings"] == 16
    assert config["sliding_window"] == 12


def test_yarn(tmp_path: Path) -> None:
    keys = arch_keys(rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=16,
                     rope__scaling__yarn_beta_fast=16.0)  # fmt: skip
    config = config_of(tmp_path, "qwen2", keys)
    assert config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0,
    }  # fmt: skip
    assert config["model_type"] == "qwen2"


@pytest.mark.parametrize(
    ("arch", "model_type", "eps"),
    [
        ("phi2", "phi", "layer_norm_eps"),
        ("falcon", "falcon", "layer_norm_epsilon"),
        ("nemotron", "nemotron", "norm_eps"),
    ],
)
def test_layer_norm_families(tmp_path: Path, arch: str, model_type: str, eps: str) -> None:
    keys = arch_keys(
        attention__layer_norm_rms_epsilon=None, attention__layer_norm_epsilon=1e-3, rope__dimension_count=4
    )
    config = config_of(tmp_path, arch, keys)
    assert config["model_type"] == model_type
    assert config[eps] == pytest.approx(1e-3)
    assert (config["rotary_dim"], config["partial_rotary_factor"]) == (4, 0.5)
    assert config.get("norm_offset_baked", False) is (arch == "nemotron")


def test_falcon_by_its_norms(tmp_path: Path) -> None:
    one = arch_keys(attention__head_count_kv=1)
    assert config_of(tmp_path, "falcon", one)["new_decoder_architecture"] is False
    norm = np.zeros(32, np.float32)
    forty = config_of(tmp_path, "falcon", arch_keys(), blk__0__attn_norm_2__weight=norm)
    assert (forty["new_decoder_architecture"], forty["num_ln_in_parallel_attn"], forty["num_kv_heads"]) == (True, 2, 2)
    eleven = config_of(tmp_path, "falcon", arch_keys())
    assert (eleven["new_decoder_architecture"], eleven["num_ln_in_parallel_attn"]) == (True, 1)
    assert eleven["qkv_layout"] == "split"


def test_every_architecture_is_one_of_gguf_and_is_read_by_the_parser(tmp_path: Path) -> None:
    from flashinfer_cli.models.hf_config import parse_config

    theirs = set(gguf.MODEL_ARCH_NAMES.values())
    for arch in ARCHITECTURES:
        assert arch in theirs
        experts = {"expert_count": 4, "expert_used_count": 2} if arch.endswith("moe") else {}
        tensors = {}
        if experts:
            tensors["blk__0__ffn_up_exps__weight"] = np.zeros((4, 12, 32), np.float32)
        if arch == "gpt-oss":
            experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 12}
        if arch == "deepseek2":
            experts = LATENT | {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 12}
        if arch == "qwen2moe":
            tensors["blk__0__ffn_up_shexp__weight"] = np.zeros((40, 32), np.float32)
        parsed = parse_config(config_of(tmp_path, arch, arch_keys(**experts), **tensors))
        assert parsed.vocab_size == 10
        assert parsed.rope is not None
        assert parsed.rope.interleaved is (arch in ("llama", "arcee", "deepseek2"))
        assert parsed.norm_offset == 0
        assert parsed.norm_eps == pytest.approx(1e-5)
        assert (parsed.moe is not None) is bool(experts)


def test_generation_config(tmp_path: Path) -> None:
    keys = arch_keys() | {
        "tokenizer.ggml.eos_token_id": 2, "general.sampling.temp": 0.5, "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.25,
    }  # fmt: skip
    assert GgufCheckpoint(write(tmp_path / "m.gguf", keys=keys)).generation_config == {
        "eos_token_id": 2, "temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25, "do_sample": True,
    }  # fmt: skip
    keys["general.sampling.temp"] = 0.0
    assert GgufCheckpoint(write(tmp_path / "m.gguf", keys=keys)).generation_config["do_sample"] is False


def test_keys_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"lacks the key 'llama\.block_count'"):
        config_of(tmp_path, keys=arch_keys(block_count=None))
    with pytest.raises(CorruptCheckpointError, match=r"'llama\.embedding_length' = 0"):
        config_of(tmp_path, keys=arch_keys(embedding_length=0))
    with pytest.raises(CorruptCheckpointError, match=r"'llama\.block_count' = 'two'"):
        config_of(tmp_path, keys=arch_keys(block_count="two"))
    with pytest.raises(UnsupportedModelError, match="from layer to layer"):
        config_of(tmp_path, keys=arch_keys(attention__head_count_kv=[1, 2]))
    assert config_of(tmp_path, keys=arch_keys(attention__head_count_kv=[2, 2]))["num_key_value_heads"] == 2
    with pytest.raises(CorruptCheckpointError, match="sliding_window"):
        config_of(tmp_path, "gemma2", arch_keys(attention__sliding_window=["a"]))
    with pytest.raises(CorruptCheckpointError, match=r"rope_freqs\.weight"):
        config_of(tmp_path, rope_freqs__weight=np.array([1, np.nan], np.float32))


def test_architectures_that_we_do_not_run(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'qwen3next'") as caught:
        config_of(tmp_path, "qwen3next")
    assert "'qwen3" in (caught.value.hint or "")
    with pytest.raises(UnsupportedModelError, match=r"general\.type is 'adapter'"):
        config_of(tmp_path, keys=arch_keys() | {"general.type": "adapter"})
