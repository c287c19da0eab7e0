"""A trained model as a Hugging Face folder: bfloat16 safetensors under the names that its family has there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer

from .data import END
from .model import Decoder

LSTM = {"weight_ih_l0": "input.weight", "bias_ih_l0": "input.bias", "weight_hh_l0": "recurrent.weight"}
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


def checkpoint_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """Name in the checkpoint -> bfloat16 tensor. What only training needs (the gate's noise) stays behind."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        stem, _, last = name.rpartition(".mlp.")
        if last in ("noise", "group_noise") or name.endswith("lstm.bias_hh_l0"):  # the latter is zero
            continue
        moe = f"model.{stem}.block_sparse_moe"
        if last == "gate":
            found[f"{moe}.gate.weight"] = value
        elif last == "group_gate":
            found[f"{moe}.group_gate.weight"] = value
        elif last in ("w1", "w2", "w3"):
            found |= {f"{moe}.experts.{e}.{last}.weight": expert for e, expert in enumerate(value)}
        else:
            found[f"model.{plain_name(name)}"] = value
    return {name: value.to(torch.bfloat16).contiguous() for name, value in found.items()}


def plain_name(name: str) -> str:
    """A parameter's name in the checkpoint: torch's names of an LSTM's become those of two matrices and a bias."""
    stem, dot, last = name.rpartition(".lstm.")
    return f"{stem}{dot}{LSTM[last]}" if dot else name


def write_folder(model: Decoder, tokenizer: Tokenizer, out: Path) -> None:
    """Write config, tokenizer, generation config, and last the weights, under a temporary name first."""
    end = tokenizer.token_to_id(END)
    assert end is not None
    config = model.shape.to_config(end)
    context = model.shape.max_position_embeddings
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "add_bos_token": True,
        "model_max_length": context,
    }
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", GENERATION | {"bos_token_id": end, "eos_token_id": end}),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    write_weights(model, out)


def write_weights(model: Decoder, out: Path) -> None:
    """Write model.safetensors, under a temporary name first."""
    temporary = out / "model.safetensors.tmp"
    temporary.write_bytes(save(checkpoint_tensors(model), metadata={"format": "pt"}))
    temporary.replace(out / "model.safetensors")
