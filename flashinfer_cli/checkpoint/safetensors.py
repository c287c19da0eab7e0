"""A Hugging Face folder of safetensors: one file, shards behind an index, or a single file beside its config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedModelError
from .base import TensorInfo
from .files import names_in, quoted, read_json
from .safetensors_header import read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt")


class SafetensorsCheckpoint:
    """An opened folder or file. Only the headers and config.json are read, and the files are never written.

    Raises CheckpointNotFoundError where there is no model, CorruptCheckpointError where files contradict themselves or
    each other, UnsupportedModelError for pickles and quantized weights. Each names the file.
    """

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path if path.is_dir() else path.parent
        names = names_in(folder)
        shards, index = _choose(path, folder, names)
        self._files = [folder / name for name in shards]
        self.config: dict[str, Any] = _config(folder, names)
        generation = folder / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json(generation) if generation.name in names else {}
        self.tensors: Mapping[str, TensorInfo] = _tensors(self._files, index, folder / INDEX)

    @property
    def files(self) -> list[Path]:
        """The files that hold weights, sorted by name."""
        return list(self._files)


def _choose(path: Path, folder: Path, names: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """(names of the weight files, tensor -> file where an index says so)."""
    if path != folder and path.suffix == ".safetensors":
        index = _read_index(folder / INDEX) if INDEX in names else {}
        if path.name not in index.values():
            return [path.name], None
    elif SINGLE in names:
        return [SINGLE], None
    elif INDEX in names:
        index = _read_index(folder / INDEX)
    else:
        found = [name for name in names if name.endswith(".safetensors") and (folder / name).is_file()]
        if not found:
            raise _nothing(folder, names)
        return found, None
    shards = sorted(set(index.values()))
    for name in shards:
        if not os.path.isfile(folder / name):  # Path.is_file raises for names too long
            raise CorruptCheckpointError(
                f"{folder / INDEX} names the file {quoted(name)}, which is missing.",
                "Complete the download of the model.",
            )
    return shards, index


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{path} has no 'weight_map'.")
    for tensor, name in weight_map.items():
        # Only plain names: a path could lead to any file of this machine. Links in the folder are the user's own.
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
            raise CorruptCheckpointError(
                f"{path} sends tensor {quoted(tensor)} to {quoted(str(name))}, which is not a plain file name."
            )
        if not name.endswith(".safetensors"):
            raise CorruptCheckpointError(
                f"{path} sends tensor {quoted(tensor)} to {quoted(name)}, which is not a safetensors file."
            )
    return weight_map


def _nothing(folder: Path, names: list[str]) -> Exception:
    if not names:
        return CheckpointNotFoundError(f"The folder {folder} is empty.")
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return UnsupportedModelError(
            f"{folder} holds its weights only as a pickle ('{pickles[0]}'), and opening a pickle can run any code.",
            "Take a safetensors version, or convert it where you trust it (transformers: model.save_pretrained).",
        )
    return CheckpointNotFoundError(
        f"{folder} holds no model: there are no .safetensors files in it.",
        "Give a Hugging Face folder, a .gguf file, a bundle, or org/name.",
    )


def _config(folder: Path, names: list[str]) -> dict[str, Any]:
    if "config.json" not in names:
        adapter = "adapter_config.json" in names
        raise CheckpointNotFoundError(
            f"{folder} has weights but no config.json, so the architecture is unknown.",
            "It is an adapter: merge it into its base model first."
            if adapter
            else "Copy the model's config.json beside them.",
        )
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    places = (config, text) if isinstance(text, dict) else (config,)
    for key in ("quantization_config", "compression_config", "quantization"):
        for place in places:
            if place.get(key) and not (key == "quantization_config" and _is_read(place[key])):
                method = _method(key, place[key])
                raise UnsupportedModelError(
                    f"The weights of {folder} are quantized with {method}, which is not supported.",
                    "Take the original model, or a GGUF file of it.",
                )
    return config


def _is_read(value: Any) -> bool:
    """Is it a way of storing weights that we compute on."""
    return isinstance(value, dict) and value.get("quant_method") == "mxfp4"


def _method(key: str, value: Any) -> str:
    if isinstance(value, dict):
        found = value.get("quant_method") or value.get("quantization_method") or value.get("format")
        if found:
            return quoted(str(found))
        if value.get("load_in_4bit") or value.get("load_in_8bit"):
            return "'bitsandbytes'"
    return "MLX's 'quantization'" if key == "quantization" else f"an unnamed method ('{key}')"


def _tensors(files: list[Path], index: dict[str, str] | None, index_path: Path) -> dict[str, TensorInfo]:
    """The tensors of all files by name; where two files have the same, the index says which one counts."""
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            chosen = index.get(name) if index is not None else None
            if chosen is not None and chosen != path.name:
                continue
            if name in tensors:
                raise CorruptCheckpointError(f"Tensor {quoted(name)} is both in {tensors[name].path} and in {path}.")
            tensors[name] = info
    for name, file in (index or {}).items():
        if name not in tensors:
            raise CorruptCheckpointError(
                f"{index_path} places tensor {quoted(name)} in {quoted(file)}, which does not have it."
            )
    if not tensors:
        raise CorruptCheckpointError(f"{files[0]} holds no tensors.")
    return tensors
