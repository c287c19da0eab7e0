"""Tiny GGUF files by gguf's own writer: what the tests of reading them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

SIZES = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
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
