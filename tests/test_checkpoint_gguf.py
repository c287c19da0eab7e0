"""GGUF files: against the gguf package that writes them, the configs made of their metadata, and files that lie."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from flashinfer_cli.checkpoint.base import FORMATS
from flashinfer_cli.checkpoint.gguf import GgufCheckpoint
from flashinfer_cli.checkpoint.gguf_config import ARCHITECTURES
from flashinfer_cli.checkpoint.gguf_header import GGML_FORMATS, read_gguf_header
from flashinfer_cli.checkpoint.open import open_checkpoint
from flashinfer_cli.checkpoint.rows import read_rows
from flashinfer_cli.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GenaiRunError,
    UnsupportedModelError,
)

SIZES = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
LATENT = {"rope.dimension_count": 8, "attention.kv_lora_rank": 32, "attention.key_length": 24,
          "attention.value_length": 16}  # fmt: skip
TENSORS = {"token_embd.weight": np.zeros((10, 32), np.float32), "output.weight": np.zeros((10, 32), np.float32)}


def write(path: Path, arch: str = "llama", keys: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None,
          raw: dict[str, tuple[Any, gguf.GGMLQuantizationType]] | None = None, **options: Any) -> Path:  # fmt: skip
    """A tiny file by gguf's own writer; keys with a dot in front belong to the architecture."""
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in (keys if keys is not None else arch_keys()).items():
        name = f"{arch}{key}" if key.startswith(".") else key
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, array in (TENSORS if tensors is None else tensors).items():
        writer.add_tensor(name, array)
    for name, (array, kind) in (raw or {}).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def arch_keys(**changed: Any) -> dict[str, Any]:
    merged = {**SIZES, **{key.replace("__", "."): value for key, value in changed.items()}}
    return {f".{key}": value for key, value in merged.items() if value is not None}


def config_of(
    tmp_path: Path, arch: str = "llama", keys: dict[str, Any] | None = None, **tensors: Any
) -> dict[str, Any]:
    named = {name.replace("__", "."): array for name, array in tensors.items()}
    path = write(tmp_path / "m.gguf", arch, keys, {**TENSORS, **named})
    made = GgufCheckpoint(path).config
    json.dumps(made)  # a bundle writes it as config.json
    return made


# ------------------------------------------------------------------ what a file says


def test_metadata_and_tensors_match_the_reader_of_gguf(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "token_embd.weight": rng.standard_normal((10, 32)).astype(np.float32),
        "blk.0.ffn_up_exps.weight": rng.standard_normal((3, 6, 32)).astype(np.float16),
        "blk.0.norm.weight": rng.standard_normal(32).astype(np.float32),
    }
    quantized = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    keys = arch_keys() | {
        "general.name": "Größe ∞",
        "tokenizer.ggml.tokens": ["a", "", "ü" * 9, "<s>"],
        "tokenizer.ggml.scores": [0.5, -1.5],
        "tokenizer.ggml.token_type": [1, 3, 6],
        "flag": True,
    }
    path = write(tmp_path / "m.gguf", keys=keys, tensors=tensors,
                 raw={"q.weight": (quantized, gguf.GGMLQuantizationType.Q8_0)})  # fmt: skip
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.kind == "gguf"
    assert checkpoint.files == [path]
    meta = checkpoint.metadata
    assert meta["general.name"] == "Größe ∞"
    assert meta["tokenizer.ggml.tokens"] == ["a", "", "ü" * 9, "<s>"]
    np.testing.assert_array_equal(meta["tokenizer.ggml.scores"], np.array([0.5, -1.5], np.float32))
    np.testing.assert_array_equal(meta["tokenizer.ggml.token_type"], [1, 3, 6])
    assert meta["flag"] is True
    assert meta["llama.block_count"] == 2
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(theirs) == set(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        assert info.shape == tuple(int(n) for n in theirs[name].shape)[::-1]
        assert info.offset == theirs[name].data_offset
        assert info.format == theirs[name].tensor_type.name
        assert read_rows(info, 0, info.num_rows).tobytes() == theirs[name].data.tobytes()
    up = checkpoint.tensors["blk.0.ffn_up_exps.weight"]
    row = read_rows(up, 2 * 6 + 1, 1).view(np.float16)
    np.testing.assert_array_equal(row, tensors["blk.0.ffn_up_exps.weight"][2, 1])


def test_our_table_of_types_is_ggmls() -> None:
    for number, name in GGML_FORMATS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == FORMATS[name]


def test_strings_across_the_buffers_edge(tmp_path: Path) -> None:
    tokens = [f"{i}" * (i % 50) for i in range(60_000)] + ["x" * 3_000_000]
    path = write(tmp_path / "m.gguf", keys=arch_keys() | {"tokenizer.ggml.tokens": tokens, "after": 7})
    metadata = GgufCheckpoint(path).metadata
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert metadata["after"] == 7


def test_a_file_is_known_by_its_magic_or_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "sha256-abc")
    assert open_checkpoint(tmp_path / "sha256-abc").kind == "gguf"
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "one.gguf")
    assert open_checkpoint(tmp_path / "folder").kind == "gguf"
    write(tmp_path / "folder" / "two.gguf")
    with pytest.raises(CheckpointNotFoundError, match="2 GGUF models"):
        open_checkpoint(tmp_path / "folder")


# ------------------------------------------------------------------ split files


def split(tmp_path: Path) -> list[Path]:
    tensors = {f"blk.{i}.x.weight": np.full((4, 32), i, np.float32) for i in range(4)}
    write(tmp_path / "m.gguf", tensors={**TENSORS, **tensors}, split_max_tensors=2)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_any_part_opens_all(tmp_path: Path) -> None:
    parts = split(tmp_path)
    assert len(parts) >= 3
    for given in (parts[0], parts[-1], tmp_path):
        checkpoint = open_checkpoint(given)
        assert checkpoint.files == parts
        assert len(checkpoint.tensors) == 6
        assert checkpoint.config["model_type"] == "llama"
        info = checkpoint.tensors["blk.3.x.weight"]
        assert (read_rows(info, 1, 2).view(np.float32) == 3).all()


def test_missing_and_renamed_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptCheckpointError, match=f"'{parts[1].name}' is missing"):
        open_checkpoint(parts[0])
    parts[0].rename(tmp_path / "m.gguf")
    with pytest.raises(CorruptCheckpointError, match="its name does not say which"):
        open_checkpoint(tmp_path / "m.gguf")


# ------------------------------------------------------------------ configs


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


# ------------------------------------------------------------------ files that lie


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def forge(path: Path, *, tensors: bytes = b"", count: int = 0, keys: bytes = b"", key_count: int = 0,
          version: int = 3, magic: bytes = b"GGUF", data: int = 0) -> Path:  # fmt: skip
    head = magic + struct.pack("<IQQ", version, count, key_count) + keys + tensors
    path.write_bytes(head + bytes(-len(head) % 32 + data))
    return path


def row(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 1 << 60
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"GGML"}, "does not start with 'GGUF'"),
    "tensor count": ({"count": HUGE}, "claims 1152921504606846976 tensors"),
    "key count": ({"key_count": HUGE}, "keys, more than can be"),
    "missing tensors": ({"count": 1}, "tensors, more than can be"),
    "key length": ({"key_count": 1, "keys": struct.pack("<Q", HUGE) + bytes(64)}, "bytes in a key"),
    "string length": ({"key_count": 1, "keys": text("k") + struct.pack("<IQ", 8, HUGE) + bytes(9)}, "bytes in 'k'"),
    "array length": ({"key_count": 1, "keys": text("k") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(9)}, "values in 'k'"),
    "strings": ({"key_count": 1, "keys": text("k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(9)}, "strings in 'k'"),
    "string in array": (
        {"key_count": 1, "keys": text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 20) + bytes(9)},
        "inside of 'k'",
    ),
    "long string in array": (
        {"key_count": 1, "keys": text("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE) + bytes(9)}, "claims a string of",
    ),
    "type": ({"key_count": 1, "keys": text("k") + struct.pack("<I", 77) + bytes(32)}, "unknown type 77"),
    "array in array": ({"key_count": 1, "keys": text("k") + struct.pack("<IIQ", 9, 9, 0) + bytes(32)}, "of type 9"),
    "key twice": ({"key_count": 2, "keys": (text("k") + struct.pack("<II", 4, 1)) * 2}, "the key 'k' twice"),
    "key not text": ({"key_count": 1, "keys": struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 1)}, "not UTF-8"),
    "alignment": (
        {"key_count": 1, "keys": text("general.alignment") + struct.pack("<II", 4, 24)}, "alignment 24, which is"
    ),
    "dimensions": ({"count": 1, "tensors": row(shape=(1,) * 5)}, "'t' has 5 dimensions"),
    "many dimensions": ({"count": 1, "tensors": text("t") + struct.pack("<I", 1 << 30) + bytes(64)}, "dimensions"),
    "overflow": ({"count": 1, "tensors": row(shape=(1 << 33, 1 << 33)), "data": 128}, "'t' has the shape"),
    "outside": ({"count": 1, "tensors": row(shape=(33,)), "data": 128}, "'t' ends at byte"),
    "offset outside": ({"count": 1, "tensors": row(offset=1 << 62), "data": 128}, "'t' ends at byte"),
    "not aligned": ({"count": 1, "tensors": row(offset=4), "data": 256}, "'t' begins at 4"),
    "overlap": ({"count": 2, "tensors": row() + row("u", offset=96), "data": 256}, "'u' overlaps"),
    "twice": ({"count": 2, "tensors": row() + row(offset=128), "data": 256}, "'t' is there twice"),
    "part of a block": ({"count": 1, "tensors": row(shape=(33,), kind=8), "data": 256}, "no multiple of the 32"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(tmp_path: Path, lie: str) -> None:
    parts, says = LIES[lie]
    path = forge(tmp_path / "m.gguf", **parts)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message


def test_versions_and_byte_order(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="version 1"):
        open_checkpoint(forge(tmp_path / "m.gguf", version=1))
    with pytest.raises(UnsupportedModelError, match="version 9"):
        open_checkpoint(forge(tmp_path / "m.gguf", version=9))
    big = write(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        open_checkpoint(big)
    good = bytearray(write(tmp_path / "m.gguf").read_bytes())
    good[4] = 2  # version 2 has the same layout
    (tmp_path / "m.gguf").write_bytes(good)
    assert open_checkpoint(tmp_path / "m.gguf").config["model_type"] == "llama"


@pytest.mark.parametrize(("kind", "name"), [(16, "IQ2_XXS"), (34, "TQ1_0"), (200, "ggml type 200")])
def test_unsupported_types_name_tensor_and_type(tmp_path: Path, kind: int, name: str) -> None:
    path = forge(tmp_path / "m.gguf", count=1, tensors=row("blk.0.x", (256,), kind), data=1024)
    with pytest.raises(UnsupportedModelError, match=rf"'blk\.0\.x' has the type {name}"):
        open_checkpoint(path)


def test_empty_and_cut_off(tmp_path: Path) -> None:
    good = write(tmp_path / "good.gguf", keys=arch_keys() | {"tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
    for size in range(0, len(good) - 1, 7):  # gguf pads the last tensor to the alignment: here its end is the file's
        (tmp_path / "cut.gguf").write_bytes(good[:size])
        with pytest.raises(CorruptCheckpointError):
            open_checkpoint(tmp_path / "cut.gguf")


def test_damaged_bytes_never_escape_as_anything_else(tmp_path: Path) -> None:
    keys = arch_keys(rope__scaling__type="yarn", rope__scaling__factor=2.0) | {"tokenizer.ggml.tokens": ["a", "b"]}
    path = write(tmp_path / "m.gguf", keys=keys, tensors={"token_embd.weight": np.zeros((2, 32), np.float32)})
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(800):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(len(bad) - 256)] = rng.choice((0, 1, 4, 6, 8, 9, 127, 255, rng.randrange(256)))
        path.write_bytes(bad)
        try:
            GgufCheckpoint(path)
        except GenaiRunError:
            refused += 1
    assert refused > 400


def test_opening_keeps_no_data(tmp_path: Path) -> None:
    """A sparse 64 GiB tensor opens by its header."""
    path = tmp_path / "m.gguf"
    forge(path, count=1, tensors=row(shape=(1 << 14, 1 << 20)))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 36))
    info = read_gguf_header(path).tensors["t"]
    assert (info.shape, info.nbytes) == ((1 << 20, 1 << 14), 1 << 36)


@pytest.mark.real
def test_real_files_open_fast_and_small() -> None:
    folder = os.environ.get("GENAI_RUN_MODELS")
    paths = sorted(Path(folder).glob("*.gguf")) if folder else []
    if not paths:
        pytest.skip("GENAI_RUN_MODELS names no folder with GGUF files")
    for path in paths:
        before = time.perf_counter()
        checkpoint = GgufCheckpoint(path)
        assert time.perf_counter() - before < 2
        theirs = {t.name: (int(t.data_offset), int(t.n_bytes)) for t in gguf.GGUFReader(path).tensors}
        assert {name: (t.offset, t.nbytes) for name, t in checkpoint.tensors.items()} == theirs
