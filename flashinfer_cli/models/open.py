"""A model opened and understood, nothing of its weights loaded yet: what inspecting, planning, bundling and running
share."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..bundles.reader import open_bundle
from ..bundles.sparsity import PREDICTORS_FILE, Sparsity, read_sparsity
from ..checkpoint.base import Checkpoint
from ..checkpoint.hub import resolve
from ..checkpoint.open import is_bundle, open_checkpoint
from ..config import KvCacheType, ModelConfig, WeightMap
from ..errors import CorruptCheckpointError, TokenizerError
from ..kernels.kept import kept_format_of, kept_nbytes
from ..tokenizer import Tokenizer, load_tokenizer
from .families import FAMILIES
from .hf_config import parse_config
from .weights import weight_map


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint with its configuration and the place of every weight."""

    name: str  # as the user gave it
    checkpoint: Checkpoint
    config: ModelConfig
    weights: WeightMap

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when first asked for; TokenizerError where there is none."""
        return load_tokenizer(self.checkpoint)

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, its end-of-sequence ids completed from the config and the tokenizer."""
        given = dict(self.checkpoint.generation_config)
        if given.get("eos_token_id") is None:
            known = list(self.config.eos_token_ids)
            with suppress(TokenizerError):
                known += [i for i in self.tokenizer.eos_token_ids if i not in known]
            given["eos_token_id"] = known
        return given

    @cached_property
    def sparsity(self) -> Sparsity | None:
        """What `calibrate` added to a bundle; None elsewhere. BundleError where it is damaged or of another bundle."""
        return read_sparsity(self.checkpoint.path) if self.checkpoint.kind == "bundle" else None

    @cached_property
    def predictors_file(self) -> Path:
        """Where `sparsity` has its predictors."""
        return self.checkpoint.path / PREDICTORS_FILE

    @property
    def exactness(self) -> str:
        """ "quantized" where a bundle's weights were rounded when it was made, else "exact"."""
        manifest = getattr(self.checkpoint, "manifest", None)
        return "exact" if manifest is None else str(manifest.exactness)

    def kv_cache_type(self, asked: KvCacheType) -> KvCacheType:
        """What `auto` means for this model: no less than its weights, and no more than they are worth."""
        if asked != "auto":
            return asked
        return "f32" if self.checkpoint.tensors[self.weights.model["embed"].tensor].format == "F32" else "f16"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds, unless a run asks for another type."""
        return kept_nbytes(self.config, kept_format_of(self.config, self.kv_cache_type("auto")))

    @property
    def parameters(self) -> int:
        """Number of weights as the configuration counts them: tied tables once."""
        seen = {(r.tensor, r.row, r.rows, r.cols) for r in self.weights.model.values()}
        packed = 0  # weights of 4 bits, two a byte; their scales are none
        for layer in self.weights.layers:
            plain = {role: ref for role, ref in layer.items() if not role.endswith(".scales")}
            seen |= {(r.tensor, r.row, r.rows, r.cols) for r in plain.values()}
            packed += sum(r.rows * r.cols for role, r in plain.items() if f"{role}.scales" in layer)
        count = packed + sum(rows * cols for _, _, rows, cols in seen)
        records = getattr(self.checkpoint, "records", {})
        for layer in records.values():
            if layer.kind == "neurons":
                count += layer.count * self.config.hidden_size * (3 if self.config.gated else 2)
            else:
                count += layer.count * sum(part.rows * part.cols for part in layer.parts)
        return count

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())

    def describe(self) -> dict[str, Any]:
        """What reports say about the model."""
        tensors = self.checkpoint.tensors.values()
        formats: dict[str, int] = {}
        for tensor in tensors:
            formats[tensor.format] = formats.get(tensor.format, 0) + tensor.nbytes
        return {
            "name": self.name,
            "path": str(self.checkpoint.path),
            "kind": self.checkpoint.kind,
            "model_type": self.config.model_type,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "formats": dict(sorted(formats.items(), key=lambda item: -item[1])),
        }


def open_model(model: str | Path, *, revision: str | None = None, quiet: bool = True) -> OpenModel:
    """Open a folder, a GGUF file, a bundle or org/name. Reads headers only."""
    path = resolve(str(model), revision=revision, quiet=quiet)
    if is_bundle(path):
        bundle = open_bundle(path)
        return OpenModel(str(model), bundle, parse_config(bundle.config), bundle.weights)
    checkpoint = open_checkpoint(path)
    config = parse_config(checkpoint.config)
    if config.model_type not in FAMILIES:
        raise CorruptCheckpointError(f"{path} has no model_type we know.")
    kind: Literal["gguf", "safetensors"] = "gguf" if checkpoint.kind == "gguf" else "safetensors"
    return OpenModel(str(model), checkpoint, config, weight_map(config, checkpoint.tensors, kind))
