"""A folder that `train` wrote, back as the module it was trained as: what tuning and uptraining start from."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import UsageError
from .export import checkpoint_tensors, plain_name
from .model import Decoder, MoeFfn
from .shape import Shape

FAMILIES = ("llama", "mixtral", "mixture_of_depths", "moe_lstm")
MOST = 30_000_000  # weights of the largest model that is trained here


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that a config.json describes. Raises UsageError for what our small modules are not."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UsageError(
            f"A model of type '{model_type}' cannot be trained here.",
            f"Training knows the shapes of its own small models: {', '.join(FAMILIES)}.",
        )
    given = {field.name: config[field.name] for field in fields(Shape) if field.name in config}
    if config.get("num_local_experts"):
        given["num_experts"] = config["num_local_experts"]
        given.setdefault("moe_intermediate_size", config.get("intermediate_size", 0))
    given["recurrent"] = model_type == "moe_lstm"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "rope_theta" in rope:
        given["rope_theta"] = rope["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    shape = Shape(**given)
    for wrong, what in (
        (kind != "default", f"RoPE scaling of type '{kind}'"),
        (not config.get("tie_word_embeddings"), "an output head of its own"),
        (config.get("attention_bias") or config.get("mlp_bias"), "biases"),
        (config.get("head_dim", shape.head_dim) != shape.head_dim, "heads of another width than hidden / heads"),
        (config.get("sliding_window"), "a sliding window"),
    ):
        if wrong:
            raise UsageError(f"The model has {what}, which training here does not know.", "Train it elsewhere.")
    return shape


def load_decoder(folder: Path) -> Decoder:
    """The trainable module of a folder, in float32. Expert gates are without noise, whose weights are not kept."""
    config_file, weights = folder / "config.json", folder / "model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        raise UsageError(f"{folder} is no folder with config.json and model.safetensors.", "Give a model of `train`.")
    shape = shape_of(json.loads(config_file.read_text(encoding="utf-8")))
    tensors = load_file(weights)
    count = sum(t.numel() for t in tensors.values())
    if count > MOST:
        raise UsageError(
            f"{count / 1e6:,.0f} million weights are too many to train here.",
            f"Up to {MOST / 1e6:.0f} million are trained on a CPU; train larger ones elsewhere.",
        )
    model = Decoder(shape)
    for block in model.modules():
        if isinstance(block, MoeFfn):
            block.noisy = False
    names = checkpoint_tensors(model)
    if names.keys() != tensors.keys():
        odd = min(names.keys() ^ tensors.keys())
        raise UsageError(f"The tensor '{odd}' does not fit the modules that are trained here.")
    state = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            stem, _, last = name.rpartition(".mlp.")
            moe = f"model.{stem}.block_sparse_moe"
            if last in ("noise", "group_noise") or name.endswith("lstm.bias_hh_l0"):
                continue
            if last in ("gate", "group_gate"):
                value.copy_(tensors[f"{moe}.{last}.weight"])
            elif last in ("w1", "w2", "w3"):
                value.copy_(torch.stack([tensors[f"{moe}.experts.{e}.{last}.weight"] for e in range(len(value))]))
            else:
                value.copy_(tensors[f"model.{plain_name(name)}"])
    return model
