"""Which kind of checkpoint a path is."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointNotFoundError, UnsupportedModelError
from .base import Checkpoint
from .files import names_in, opened
from .gguf import GgufCheckpoint, split_name
from .safetensors import PICKLES, SafetensorsCheckpoint

BUNDLE_FILE = "bundle.json"


def is_bundle(path: Path) -> bool:
    """Whether the folder is a bundle of ours, whatever its state; bundles/ opens those."""
    return (path / BUNDLE_FILE).is_file()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors folder or file, a GGUF file (any part of a split one), or a folder that holds one GGUF model.

    Reads headers only. Raises CheckpointError subclasses that name what is wrong.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointNotFoundError(f"{path} is not there.")
    if path.suffix == ".gguf" or _starts_as_gguf(path):
        return GgufCheckpoint(path)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path)
    if path.suffix in PICKLES:
        raise UnsupportedModelError(
            f"{path} looks like a pickle, and opening a pickle can run any code.", "Convert it to safetensors first."
        )
    raise CheckpointNotFoundError(
        f"{path} is not a model file that we know.", "Give a Hugging Face folder, a .gguf file, a bundle, or org/name."
    )


def _starts_as_gguf(path: Path) -> bool:
    """Files without a suffix, as ollama and the hub's cache have them, are known by their magic."""
    with opened(path) as (file, _):
        return file.read(4) == b"GGUF"


def _open_folder(folder: Path) -> Checkpoint:
    names = names_in(folder)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return SafetensorsCheckpoint(folder)
    models: dict[tuple[str, int], str] = {}  # the parts of a split file are one model
    for name in names:
        if name.endswith(".gguf") and not name.startswith("mmproj"):
            split = split_name(name)
            models.setdefault((split[0], split[2]) if split else (name, 0), name)
    found = sorted(models.values())
    if len(found) > 1:
        raise CheckpointNotFoundError(
            f"{folder} holds {len(found)} GGUF models, so name one of them.", f"For example {folder / found[0]}."
        )
    return GgufCheckpoint(folder / found[0]) if found else SafetensorsCheckpoint(folder)
