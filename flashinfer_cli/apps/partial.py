"""Layers that are calibrated already, kept beside the bundle until all are, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from ..bundles.publish import move_atomic, write_atomic
from ..bundles.sparsity import ORDER_FILE, PREDICTORS_FILE, SPARSITY_FILE, LayerSparsity, Sparsity, sparsity_json

PARTIAL = ".calibration"
STAGES = 3  # the recall asked for, and twice a higher one where that costs too much perplexity


class Partial:
    """Layers that are done, in a hidden folder beside the bundle, for the same bundle, text and recall only; at the end
    what is measured before the bundle has it. `stage`: how often thresholds were set anew, a folder each."""

    def __init__(self, bundle: Path, what: str, stage: int = 0) -> None:
        self.bundle, self.folder = bundle, _folder(bundle, stage)
        key = hashlib.sha256(what.encode()).hexdigest()
        if not (self.folder / "key").exists() or (self.folder / "key").read_text() != key:
            _remove(self.folder)
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

    def join(self) -> Path:
        """All layers' predictors as one file."""
        tensors = {k: v for i in self.layers for k, v in load_file(self.folder / f"{i}.safetensors").items()}
        save_file(tensors, self.folder / PREDICTORS_FILE)
        return self.folder / PREDICTORS_FILE

    def publish(self, found: Sparsity) -> None:
        """Put predictors, order and statistics into the bundle: the last make it sparse, those of before go first."""
        (self.bundle / SPARSITY_FILE).unlink(missing_ok=True)
        for name in (PREDICTORS_FILE, ORDER_FILE):
            move_atomic(self.folder / name, self.bundle / name)
        write_atomic(self.bundle / SPARSITY_FILE, sparsity_json(found))
        for stage in range(STAGES):
            _remove(_folder(self.bundle, stage))


def _folder(bundle: Path, stage: int) -> Path:
    return bundle.with_name(f".{bundle.name}{PARTIAL}{f'-{stage}' if stage else ''}")


def _remove(folder: Path) -> None:
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
