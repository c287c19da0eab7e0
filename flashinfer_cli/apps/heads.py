"""Fewer key/value heads for a checkpoint (2305.13245, section 2.1; one head is 1911.02150): streaming, safetensors to
safetensors."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bundles.publish import partial_folder, write_all
from ..bundles.source import SourceFiles
from ..checkpoint.base import TensorInfo
from ..config import MiB, ModelConfig
from ..errors import StorageError, UnsupportedModelError, UsageError
from ..models.families import FAMILIES, WRAPPERS
from ..models.open import OpenModel
from .bundling import TEXT_FILES, open_source

METHODS = ("mean", "first", "random")
FIXED = ("opt", "persimmon", "deepseek_v2")  # a config of these cannot say that heads are shared
CHUNK = 16 * MiB  # bytes copied at once
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pool(heads: torch.Tensor, kv_heads: int, method: str, generator: torch.Generator) -> torch.Tensor:
    """[old heads, rows of a head, columns] -> [kv_heads, rows, columns], a head for each contiguous group.

    `mean` averages a group in float64 and rounds once, so that heads that are equal already come out as they are;
    `first` keeps a group's first; `random` draws normal weights as wide as the old ones.
    """
    group = heads.shape[0] // kv_heads
    grouped = heads.view(kv_heads, group, *heads.shape[1:])
    if method == "mean":
        return grouped.double().mean(1).to(heads.dtype)
    if method == "first":
        return grouped[:, 0].contiguous()
    wide = heads.float()
    drawn = torch.randn(kv_heads, *heads.shape[1:], generator=generator) * wide.std(correction=0) + wide.mean()
    return drawn.to(heads.dtype)


def convert_tensor(
    whole: torch.Tensor, role: str, config: ModelConfig, kv_heads: int, method: str, generator: torch.Generator
) -> torch.Tensor:
    """A tensor [rows, columns] of keys, values, or of fused q/k/v, with fewer key/value heads."""
    hd, old, queries = config.head_dim, config.num_key_value_heads, config.num_attention_heads
    flat = whole.reshape(whole.shape[0], -1)

    def fewer(rows: torch.Tensor) -> torch.Tensor:
        return pool(rows.reshape(old, hd, -1), kv_heads, method, generator)

    if role != "qkv":
        found = fewer(flat).reshape(kv_heads * hd, -1)
    elif config.qkv_layout == "grouped":  # a kv head after the other: its queries, its key, its value
        parts = flat.view(old, queries // old + 2, hd, -1)
        q = parts[:, :-2].reshape(kv_heads, queries // kv_heads, hd, -1)
        found = torch.cat((q, fewer(parts[:, -2])[:, None], fewer(parts[:, -1])[:, None]), 1).reshape(
            (queries + 2 * kv_heads) * hd, -1
        )
    else:
        q, k, v = flat.split((queries * hd, old * hd, old * hd))
        found = torch.cat((q, *(fewer(x).reshape(kv_heads * hd, -1) for x in (k, v))))
    return found.reshape(found.shape[0], *whole.shape[1:]).contiguous()


def changed_tensors(opened: OpenModel) -> dict[str, str]:
    """Tensor -> role (k, v or qkv) of every tensor that depends on the number of key/value heads."""
    found: dict[str, str] = {}
    for layer in opened.weights.layers:
        for role, ref in layer.items():
            stem = role.removesuffix(".bias")
            if stem in ("k", "v", "qkv"):
                found[ref.tensor] = stem
            elif stem == "k_norm" and opened.config.qk_norm == "full":
                found[ref.tensor] = "k"
    return found


def converted_config(opened: OpenModel, kv_heads: int) -> dict[str, Any]:
    """The config.json that says so. Raises UnsupportedModelError where the family's cannot."""
    config, old = copy.deepcopy(opened.checkpoint.config), opened.config.num_key_value_heads
    if kv_heads == old:
        return config
    inner = config["text_config"] if config.get("model_type") in WRAPPERS else config
    model_type = opened.config.model_type
    if model_type in FIXED:
        raise UnsupportedModelError(
            f"Nothing in a config of '{model_type}' says that heads are shared, so no other program could read it.",
            f"Only {old} heads, as they are, can be written.",
        )
    if model_type == "falcon" and not inner.get("new_decoder_architecture"):
        if kv_heads != 1:
            raise UnsupportedModelError(
                "A falcon of the older architecture has all its key/value heads or a single one.",
                "Give --kv-heads 1.",
            )
        inner["multi_query"] = True
        return config
    inner[FAMILIES[model_type].key("num_key_value_heads")] = kv_heads
    return config


def check(opened: OpenModel, kv_heads: int, method: str) -> None:
    """Raises UsageError for numbers of heads that make no groups, and for sources that are not safetensors."""
    old = opened.config.num_key_value_heads
    if opened.checkpoint.kind != "safetensors":
        raise UsageError(
            f"{opened.name} is a GGUF file, whose quantised heads cannot be averaged as they are.",
            "Convert the original safetensors folder.",
        )
    if method not in METHODS:
        raise UsageError(f"There is no method '{method}'.", f"Methods are {', '.join(METHODS)}.")
    if kv_heads < 1 or old % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, old + 1) if old % n == 0)
        raise UsageError(
            f"{old} key/value heads cannot be made {kv_heads}: groups must be of one size.",
            f"--kv-heads may be {divisors}.",
        )


def convert_heads(
    model: str | Path,
    out: str | Path,
    kv_heads: int,
    *,
    method: str = "mean",
    seed: int = 1,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the folder `out`: `model` with `kv_heads` key/value heads; returns figures of what changed.

    One tensor of keys or values is in memory at a time; all others are copied in pieces of 16 MiB. OUT appears whole or
    not at all. Raises UsageError, UnsupportedModelError, and StorageError when the disk will not take it.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists.", "Give another OUT.")
    opened = open_source(model, revision)
    check(opened, kv_heads, method)
    config = converted_config(opened, kv_heads)
    old = opened.config.num_key_value_heads
    changed = {} if kv_heads == old else changed_tensors(opened)
    tensors = sorted(opened.checkpoint.tensors.values(), key=lambda t: t.name)
    folder = partial_folder(out)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        nbytes = _write(folder / "model.safetensors", tensors, changed, opened.config, kv_heads, method, seed, progress)
        source = opened.checkpoint.path if opened.checkpoint.path.is_dir() else opened.checkpoint.path.parent
        for name in TEXT_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(folder, out)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StorageError(f"Cannot write {out}: {error.strerror or error}.") from None
    before = opened.kv_bytes_per_token
    return {
        "source": opened.name,
        "method": method,
        "num_attention_heads": opened.config.num_attention_heads,
        "kv_heads_before": old,
        "kv_heads": kv_heads,
        "kv_bytes_per_token_before": before,
        "kv_bytes_per_token": before * kv_heads // old,
        "weight_bytes_before": opened.weight_bytes,
        "weight_bytes": nbytes,
    }


def _shape(info: TensorInfo, role: str | None, config: ModelConfig, kv_heads: int) -> tuple[int, ...]:
    if role is None:
        return info.shape
    old, hd = config.num_key_value_heads, config.head_dim
    gone = (old - kv_heads) * hd * (2 if role == "qkv" else 1)
    return (info.shape[0] - gone, *info.shape[1:])


def _write(
    path: Path,
    tensors: list[TensorInfo],
    changed: dict[str, str],
    config: ModelConfig,
    kv_heads: int,
    method: str,
    seed: int,
    progress: Callable[[int, int], None],
) -> int:
    """Write the safetensors file; returns the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in tensors:
        shape = _shape(info, changed.get(info.name), config, kv_heads)
        size = info.nbytes // info.shape[0] * shape[0] if info.name in changed else info.nbytes
        header[info.name] = {"dtype": info.format, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, memoryview(len(text).to_bytes(8, "little") + text))
        with SourceFiles() as source:
            done = 0
            for info in tensors:
                if role := changed.get(info.name):
                    raw = np.empty(info.nbytes, np.uint8)
                    source.read(info.path, info.offset, raw)
                    if info.format not in DTYPES:
                        raise UnsupportedModelError(f"Tensor '{info.name}' has the format {info.format}.")
                    whole = torch.from_numpy(raw).view(DTYPES[info.format]).view(info.shape)
                    fewer = convert_tensor(whole, role, config, kv_heads, method, generator)
                    write_all(fd, memoryview(fewer.view(-1).view(torch.uint8).numpy()))
                else:
                    for start in range(0, info.nbytes, CHUNK):
                        piece = np.empty(min(CHUNK, info.nbytes - start), np.uint8)
                        source.read(info.path, info.offset + start, piece)
                        write_all(fd, memoryview(piece))
                done += header[info.name]["data_offsets"][1] - header[info.name]["data_offsets"][0]
                progress(done, end)
        os.fsync(fd)
    finally:
        os.close(fd)
    return end
