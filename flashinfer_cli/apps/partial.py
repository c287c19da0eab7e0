"""Layers that are calibrated already, kept beside the bundle until all are, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..bundles.publish import write_atomic
from ..bundles.sparsity import LayerSparsity

PARTIAL = ".calibration"


class Partial:
    """Layers that are done, in a hidden folder beside the bundle, for the same bundle, text and recall only."""

    def __init__(self, bundle: Path, what: str) -> None:
        self.folder = _folder(bundle)
        key = hashlib.sha256(what.encode()).hexdigest()
        if not (self.folder / "key").exists() or (self.folder / "key").read_text() != key:
            forget(bundle)
            self.folder.mkdir()
            (self.folder / "key").write_text(key)
        self.layers: dict[int, LayerSparsity] = {}
        for file in self.folder.glob("*.json"):
            try:
                layer = LayerSparsity(**json.loads(file.read_text()))
                load_file(self.folder / f"{layer.layer}.safetensors")
            except (OSError, ValueError, TypeError, SafetensorError):
                continue  # damaged: learned again
            self.layers[layer.layer] = layer

    def keep(self, layer: LayerSparsity, tensors: dict[str, torch.Tensor]) -> None:
        write_atomic(self.folder / f"{layer.layer}.safetensors", save(tensors))
        write_atomic(self.folder / f"{layer.layer}.json", json.dumps(asdict(layer)).encode())
        self.layers[layer.layer] = layer

    def tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for i in self.layers for k, v in load_file(self.folder / f"{i}.safetensors").items()}


def _folder(bundle: Path) -> Path:
    return bundle.with_name(f".{bundle.name}{PARTIAL}")


def forget(bundle: Path) -> None:
    folder = _folder(bundle)
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
