"""Open a bundle: the manifest, checked against the files that stand there, seen as a checkpoint like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.base import TensorInfo
from ..checkpoint.safetensors_header import read_header
from ..config import WeightMap
from ..errors import BundleError, CheckpointError, CheckpointNotFoundError
from .format import DATA_ALIGNMENT, MANIFEST_FILE, MATRICES, TRUNK_FILE, Manifest, RecordLayout, StoredFormat
from .publish import partial_folder

_AGAIN = "Make the bundle again, or copy it again in full."


@dataclass
class BundleCheckpoint:
    """A bundle as a Checkpoint. `tensors` has the trunk's, in their real formats, and one of records a streamed layer.

    `weights` maps roles to the trunk's tensors, and to matrices kept as they were. Other FFN weights that stream are in
    `records` by layer: record n of layer l is row n of `tensors[records[l].tensor]`.
    """

    path: Path
    manifest: Manifest
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    kind: str = "bundle"

    @property
    def weights(self) -> WeightMap:
        return self.manifest.weights

    @property
    def records(self) -> dict[int, RecordLayout]:
        return self.manifest.records

    @property
    def small(self) -> dict[int, RecordLayout]:
        """Experts in fewer bits, beside those in `records`."""
        return self.manifest.small

    @property
    def files(self) -> list[Path]:
        return [self.path / name for name in self.manifest.files if name.endswith(".safetensors")]


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`. Raises BundleError without one (CheckpointNotFoundError: no path)."""
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no {path}.")
    if path.name.startswith(".") and path.name.endswith(".partial"):
        raise BundleError(f"{path} is an unfinished bundle.", "Run the same bundle command again to finish it.")
    try:
        return Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        hint = "Run the same bundle command again to finish it." if partial_folder(path).exists() else None
        raise BundleError(f"{path} is no complete bundle: it has no {MANIFEST_FILE}.", hint) from None


def open_bundle(path: Path) -> BundleCheckpoint:
    """Open the bundle at `path`; costs the headers. Every file must be there, at its size, and as the manifest has it.

    Contents are not read: `verify_bundle` does that. Raises BundleError (CheckpointNotFoundError: nothing there).
    """
    path = Path(path)
    manifest = read_manifest(path)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"The bundle {path} is incomplete: {name} is missing.", _AGAIN)
        size = file.stat().st_size
        if size != entry.bytes:
            raise BundleError(f"{file} is {size} bytes long, not {entry.bytes} as the bundle's manifest says.", _AGAIN)
    matrices = (name for name in manifest.files if name.startswith(MATRICES))
    for name in dict.fromkeys((TRUNK_FILE, *(layout.file for layout in _layouts(manifest)), *matrices)):
        if name not in manifest.files:
            raise BundleError(f"The manifest of {path} does not list {name}.", _AGAIN)
        tensors |= _read_header(path / name, manifest.formats)
    _compare(path, manifest, tensors)
    return BundleCheckpoint(
        path, manifest, tensors, _json(path, manifest, "config.json"), _json(path, manifest, "generation_config.json")
    )


def _layouts(manifest: Manifest) -> list[RecordLayout]:
    return [*manifest.records.values(), *manifest.small.values()]


def _json(path: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    if name not in manifest.files:
        return {}
    try:
        body = json.loads((path / name).read_bytes())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise BundleError(f"{path / name} is not a JSON object.", _AGAIN)
    return body


def _read_header(file: Path, formats: dict[str, StoredFormat]) -> dict[str, TensorInfo]:
    """The tensors of one of our safetensors files, those of GGUF blocks in their real formats."""
    try:
        tensors = read_header(file)
    except CheckpointError as error:
        raise BundleError(error.message, _AGAIN) from None
    if min((info.offset for info in tensors.values()), default=0) % DATA_ALIGNMENT:
        raise BundleError(f"{file} has its data off the 4,096-byte boundary.", _AGAIN)
    for name, info in tensors.items():
        if name in formats:
            stored = formats[name]
            real = TensorInfo(name, stored.format, stored.shape, file, info.offset, info.nbytes)
            if (info.format, info.shape) != ("U8", (real.num_rows, real.row_bytes)):
                raise BundleError(f"{file} and the manifest disagree about the tensor '{name}'.", _AGAIN)
            tensors[name] = real
    return tensors


def _compare(path: Path, manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    for roles in (manifest.weights.model, *manifest.weights.layers):
        for ref in roles.values():
            info = tensors.get(ref.tensor)
            if info is None or ref.cols != info.cols or not 0 <= ref.row <= ref.row + ref.rows <= info.num_rows:
                raise BundleError(
                    f"The manifest of {path} and the files disagree about the tensor '{ref.tensor}'.", _AGAIN
                )
    for layer, layout in (*manifest.records.items(), *manifest.small.items()):
        info = tensors.get(layout.tensor)
        inside = all(part.offset >= 0 and part.offset + part.nbytes <= layout.width_bytes for part in layout.parts)
        if info is None or info.row_bytes != layout.width_bytes or info.num_rows != layout.count or not inside:
            raise BundleError(f"The manifest of {path} and {layout.file} disagree about layer {layer}.", _AGAIN)
