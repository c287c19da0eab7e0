"""Open a bundle: the manifest, checked against the files that stand there, seen as a checkpoint like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.base import FORMATS, TensorInfo
from ..config import WeightMap
from ..errors import BundleError, CheckpointNotFoundError
from .format import DATA_ALIGNMENT, MANIFEST_FILE, TRUNK_FILE, Manifest, RecordLayout, StoredFormat, format_bytes
from .publish import partial_folder

_AGAIN = "Make the bundle again, or copy it again in full."


@dataclass
class BundleCheckpoint:
    """A bundle as a Checkpoint. `tensors` has the trunk's, in their real formats, and one of records a streamed layer.

    `weights` maps roles to the trunk's tensors. FFN weights that stream are in `records` by layer instead: record n of
    layer l is row n of `tensors[records[l].tensor]`.
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
    for name in dict.fromkeys((TRUNK_FILE, *(layout.file for layout in manifest.records.values()))):
        if name not in manifest.files:
            raise BundleError(f"The manifest of {path} does not list {name}.", _AGAIN)
        tensors |= _read_header(path / name, manifest.files[name].bytes, manifest.formats)
    _compare(path, manifest, tensors)
    return BundleCheckpoint(
        path, manifest, tensors, _json(path, manifest, "config.json"), _json(path, manifest, "generation_config.json")
    )


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


def _read_header(file: Path, size: int, formats: dict[str, StoredFormat]) -> dict[str, TensorInfo]:
    """The tensors of one of our safetensors files: in order, without gaps, to the end of the file."""
    damaged = BundleError(f"{file} has a damaged header.", _AGAIN)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        start = 8 + length
        if start > size or start % DATA_ALIGNMENT:
            raise damaged
        text = opened.read(length)
    found: dict[str, TensorInfo] = {}
    end = 0
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            dtype, shape = entry["dtype"], tuple(int(length) for length in entry["shape"])
            begin, end_before = entry["data_offsets"][0], end
            end = entry["data_offsets"][1]
            if begin != end_before or end - begin != prod(shape) * FORMATS[dtype][1] or min(shape, default=1) < 0:
                raise damaged
            if name in formats:
                stored = formats[name]
                blocks = (prod(stored.shape[:-1]), format_bytes(stored.format, stored.shape[-1]))
                if (dtype, shape) != ("U8", blocks):
                    raise damaged
                dtype, shape = stored.format, stored.shape
            found[name] = TensorInfo(name, dtype, shape, file, start + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError):
        raise damaged from None
    if start + end != size:
        raise damaged
    return found


def _compare(path: Path, manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    for roles in (manifest.weights.model, *manifest.weights.layers):
        for ref in roles.values():
            info = tensors.get(ref.tensor)
            if info is None or ref.cols != info.cols or not 0 <= ref.row <= ref.row + ref.rows <= info.num_rows:
                raise BundleError(
                    f"The manifest of {path} and the files disagree about the tensor '{ref.tensor}'.", _AGAIN
                )
    for layer, layout in manifest.records.items():
        info = tensors.get(layout.tensor)
        inside = all(part.offset >= 0 and part.offset + part.nbytes <= layout.width_bytes for part in layout.parts)
        if info is None or info.row_bytes != layout.width_bytes or info.num_rows != layout.count or not inside:
            raise BundleError(f"The manifest of {path} and {layout.file} disagree about layer {layer}.", _AGAIN)
