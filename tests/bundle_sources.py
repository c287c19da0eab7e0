"""Checkpoints made by hand, and the bundles of them: what the tests of bundles share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from flashinfer_cli.bundles.reader import BundleCheckpoint
from flashinfer_cli.bundles.writer import write_bundle
from flashinfer_cli.checkpoint.base import TensorInfo
from flashinfer_cli.config import ModelConfig, MoeConfig, WeightMap, WeightRef

HIDDEN, INTER, VOCAB = 24, 40, 50
NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}


class FakeCheckpoint:
    """A Checkpoint over files made here: safetensors, or one raw file of tensors in any format."""

    def __init__(self, path: Path, kind: str, tensors: dict[str, TensorInfo], config: dict[str, Any]) -> None:
        self.path, self.kind, self.tensors, self.config = path, kind, tensors, config
        self.generation_config: dict[str, Any] = {"eos_token_id": 2}

    @property
    def files(self) -> list[Path]:
        return sorted({info.path for info in self.tensors.values()})


def open_safetensors(folder: Path) -> FakeCheckpoint:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            begin, end = entry["data_offsets"]
            tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin)
    return FakeCheckpoint(folder, "safetensors", tensors, {"model_type": "llama"})


def raw_file(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray]]) -> FakeCheckpoint:
    """A file of `tensors` (format, shape, bytes), as GGUF's data section is."""
    infos, offset = {}, 0
    with path.open("wb") as file:
        for name, (format, shape, data) in tensors.items():
            raw = data.tobytes()
            file.write(raw + b"\0" * (-len(raw) % 32))
            infos[name] = TensorInfo(name, format, shape, path, offset, len(raw))
            offset += len(raw) + -len(raw) % 32
    return FakeCheckpoint(path, "gguf", infos, {"model_type": "llama"})


def model_config(layers: int, moe: MoeConfig | None = None, moe_layers: tuple[bool, ...] = ()) -> ModelConfig:
    return ModelConfig(
        "llama", VOCAB, HIDDEN, INTER, layers, 4, 2, 6, 64, "silu", moe=moe, moe_layers=moe_layers
    )  # fmt: skip


def ref(tensors: dict[str, TensorInfo], name: str, row: int = 0, rows: int | None = None) -> WeightRef:
    info = tensors[name]
    return WeightRef(name, row, info.num_rows if rows is None else rows, info.cols)


def save_dense(
    folder: Path,
    *,
    gated: bool = True,
    biases: bool = False,
    layers: int = 2,
    dtype: Any = np.float32,
    tied: bool = False,
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"embed": (VOCAB, HIDDEN), "norm": (HIDDEN,)}
    if not tied:
        shapes["head"] = (VOCAB, HIDDEN)
    for i in range(layers):
        shapes |= {
            f"{i}.norm": (HIDDEN,),
            f"{i}.qkv": (48, HIDDEN),
            f"{i}.up": (INTER, HIDDEN),
            f"{i}.down": (HIDDEN, INTER),
        }
        if gated:
            shapes[f"{i}.gate"] = (INTER, HIDDEN)
        if biases:
            shapes |= {f"{i}.up.bias": (INTER,), f"{i}.down.bias": (HIDDEN,)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(arrays, folder / "model.safetensors")
    return arrays


def dense_weights(checkpoint: FakeCheckpoint, layers: int = 2) -> WeightMap:
    tensors = checkpoint.tensors
    model = {"final_norm": ref(tensors, "norm"), "embed": ref(tensors, "embed")}
    model["head"] = ref(tensors, "head" if "head" in tensors else "embed")
    found = []
    for i in range(layers):
        roles = {"q": ref(tensors, f"{i}.qkv", 0, 24), "k": ref(tensors, f"{i}.qkv", 24, 12)}
        roles["v"] = ref(tensors, f"{i}.qkv", 36, 12)
        roles["attn_norm"] = ref(tensors, f"{i}.norm")
        names = ("gate", "up", "down", "up.bias", "down.bias")
        found.append(roles | {role: ref(tensors, f"{i}.{role}") for role in names if f"{i}.{role}" in tensors})
    return WeightMap(model, tuple(found))


def make_dense(folder: Path, out: Path, **options: Any) -> Path:
    checkpoint = open_safetensors(folder)
    return write_bundle(checkpoint, model_config(2), dense_weights(checkpoint), out, **options)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(bundle: BundleCheckpoint, name: str) -> np.ndarray:
    """The bytes of a tensor, by its place in `tensors`, as U8 [rows, row_bytes]."""
    info = bundle.tensors[name]
    raw = np.fromfile(info.path, np.uint8, info.nbytes, offset=info.offset)
    return raw.reshape(info.num_rows, info.row_bytes)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def dense_arrays(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safe_open is no mapping
