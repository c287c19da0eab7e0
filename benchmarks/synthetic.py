"""python -m benchmarks.synthetic FOLDER [NAME...]: checkpoints of real shapes with random weights, to time runs on.

Speed and memory depend on shapes and on which weights a token needs, not on whether the text makes sense. Weights are
scaled so that activations stay finite and the output wanders.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flashinfer_cli import zoo

from . import synthetic_moe, synthetic_relu

SHARD = 1 << 30  # bytes
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MODELS: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B's width, more layers, a smaller vocabulary: 3.0 GB
    "llama-3g": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


MODELS |= synthetic_relu.MODELS | synthetic_moe.MODELS
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # the zoo's: its ids are the first few thousand of ours


def tensors(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...], float]]:
    """(name, shape, standard deviation; 0 for a norm's ones) of every tensor, in the order of the forward pass."""
    d, ff, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    deep = (2 * config["num_hidden_layers"]) ** -0.5
    found: list[tuple[str, tuple[int, ...], float]] = [("model.embed_tokens.weight", (config["vocab_size"], d), 1.0)]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found += [
            (f"{layer}.input_layernorm.weight", (d,), 0.0),
            (f"{layer}.self_attn.q_proj.weight", (q, d), d**-0.5),
            (f"{layer}.self_attn.k_proj.weight", (kv, d), d**-0.5),
            (f"{layer}.self_attn.v_proj.weight", (kv, d), d**-0.5),
            (f"{layer}.self_attn.o_proj.weight", (d, q), deep * q**-0.5),
            (f"{layer}.post_attention_layernorm.weight", (d,), 0.0),
            (f"{layer}.mlp.gate_proj.weight", (ff, d), d**-0.5),
            (f"{layer}.mlp.up_proj.weight", (ff, d), d**-0.5),
            (f"{layer}.mlp.down_proj.weight", (d, ff), deep * ff**-0.5),
        ]
    return [*found, ("model.norm.weight", (d,), 0.0), ("lm_head.weight", (config["vocab_size"], d), 2 * d**-0.5)]


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint `name` under `folder`, unless it is there; returns its path."""
    out, config = folder / name, MODELS[name]
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config["dtype"])
    places: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    parts = 0

    def flush() -> None:
        nonlocal held, parts
        parts += 1
        file = f"model-{parts:05}.safetensors"
        save_file(held, out / file, {"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held = {}

    def add(found: dict[str, torch.Tensor]) -> None:
        held.update({tensor: value.to(dtype).contiguous() for tensor, value in found.items()})
        if sum(t.nbytes for t in held.values()) > SHARD:
            flush()

    built = synthetic_relu if name in synthetic_relu.MODELS else synthetic_moe if name in synthetic_moe.MODELS else None
    if built:
        torch.manual_seed(seed)
        built.write(config, add)
        for file in _TOKENIZER:
            shutil.copy(zoo.path_of("stories-relu") / file, out / file)
    else:
        generator = torch.Generator().manual_seed(seed)
        for tensor, shape, std in tensors(config):
            add({tensor: torch.randn(shape, generator=generator).mul_(std) if std else torch.ones(shape)})
    flush()
    index = {"metadata": {}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    given = parser.parse_args()
    for name in given.names:
        print(make(name, given.folder))


if __name__ == "__main__":
    main()
