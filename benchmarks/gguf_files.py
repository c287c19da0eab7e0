"""The same weights for llama.cpp: a Hugging Face folder written as GGUF, as its own converter would.

python -m benchmarks.gguf_files FOLDER FILE.gguf [F16|BF16|Q8_0|Q4_0]. Enough for the models that the benchmarks run:
llama, qwen2, arcee, mixtral, qwen3_moe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from flashinfer_cli.checkpoint.rows import read_rows
from flashinfer_cli.config import ModelConfig, WeightRef
from flashinfer_cli.kernels.reference import ReferenceKernels
from flashinfer_cli.models.names import GGUF_LAYER, GGUF_MODEL
from flashinfer_cli.models.open import OpenModel, open_model

ARCH = {"llama": "llama", "qwen2": "qwen2", "arcee": "arcee", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
PERMUTED = ("llama", "arcee", "mixtral")  # by model_type: q and k rows in interleaved pairs


def values(model: OpenModel, ref: WeightRef) -> torch.Tensor:
    """A weight as float32 [rows, cols]."""
    info = model.checkpoint.tensors[ref.tensor]
    raw = torch.from_numpy(np.array(read_rows(info, ref.row, ref.rows))).view(ref.rows, -1)
    return ReferenceKernels().dequantize(raw, info.format, ref.cols)


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a head's rows: pairs (j, j + d/2) become neighbours."""
    return rows.view(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _metadata(writer: gguf.GGUFWriter, arch: str, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    assert config.rope is not None
    writer.add_rope_dimension_count(config.rope.rotary_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if config.moe is not None:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe.moe_intermediate_size)
    # No text goes through the model: tokens are given and timed, so a vocabulary of numbers will do.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write(folder: Path, file: Path, kind: Kind) -> Path:
    """Write `folder` as `file` in one number format, norms and biases in float32; unless it is there."""
    if file.exists():
        return file
    model = open_model(folder)
    config = model.config
    if config.model_type not in ARCH:
        raise SystemExit(f"{config.model_type} is not among {', '.join(ARCH)}")
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, ARCH[config.model_type], use_temp_file=True)
    _metadata(writer, ARCH[config.model_type], config)

    def add(name: str, value: torch.Tensor) -> None:
        plain = value.flatten() if "norm" in name or name.endswith(".bias") else value
        if plain.ndim < 2 or "gate_inp" in name:
            writer.add_tensor(name, plain.float().numpy())
        elif kind == Kind.BF16:
            writer.add_tensor(name, plain.to(torch.bfloat16).view(torch.uint8).numpy(), raw_dtype=kind)
        elif kind == Kind.F16:
            writer.add_tensor(name, plain.half().numpy())
        else:
            writer.add_tensor(name, gguf.quants.quantize(plain.float().numpy(), kind), raw_dtype=kind)

    tied = model.weights.model["head"] == model.weights.model["embed"]
    for role, ref in model.weights.model.items():
        if not (role == "head" and tied):
            base, _, bias = role.partition(".")
            add(f"{GGUF_MODEL[base][0]}.{bias or 'weight'}", values(model, ref))
    for index, roles in enumerate(model.weights.layers):
        experts: dict[str, list[torch.Tensor]] = {}
        for role, ref in roles.items():
            value = values(model, ref)
            if role.startswith("experts."):
                experts.setdefault(role.split(".")[2], []).append(value)
                continue
            base, end = (role.removesuffix(".bias"), "bias") if role.endswith(".bias") else (role, "weight")
            if base in ("q", "k") and config.model_type in PERMUTED:
                value = permuted(value, config.num_attention_heads if base == "q" else config.num_key_value_heads)
            add(f"blk.{index}.{GGUF_LAYER[base][0]}.{end}", value)
        for part, matrices in experts.items():
            add(f"blk.{index}.ffn_{part}_exps.weight", torch.stack(matrices))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("kind", nargs="?", default="BF16", choices=["F16", "BF16", "Q8_0", "Q4_0"])
    given = parser.parse_args()
    print(write(given.folder, given.file, Kind[given.kind]))


if __name__ == "__main__":
    main()
