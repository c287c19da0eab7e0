"""Write a calibrated bundle anew with its neurons in another order: the same model, read in fewer pieces.

The order comes from calibration (`order.safetensors`, see `order`). A neuron's record moves as a whole; biases and the
rows of predictors move with it. Sums over neurons run in the new order, so logits differ in the last bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..config import MiB
from ..errors import BundleError, StorageError
from .format import MANIFEST_FILE, FileEntry
from .publish import HashedFile, partial_folder, publish_folder, recover, write_atomic, writer_lock
from .reader import BundleCheckpoint, open_bundle
from .sparsity import (
    ORDER_FILE,
    PREDICTORS_FILE,
    SPARSITY_FILE,
    manifest_digest,
    predictor_tensor,
    read_sparsity,
    sparsity_json,
)

ORDER = "coactivation"
_BLOCK = 8 * MiB
Progress = Callable[[int, int, str], None]
_Patches = list[tuple[int, np.ndarray]]  # where in a file, and bytes to stand there


def reorder(bundle: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Write a calibrated bundle to `out` with the neurons of each layer in the order of its calibration; returns `out`.

    Raises BundleError where the bundle is not calibrated, is ordered already, or `out` is there.
    """
    source, out = open_bundle(Path(bundle)), Path(os.path.abspath(out))
    sparsity = read_sparsity(source.path)
    if source.manifest.parameters.get("order") == ORDER:
        raise BundleError(f"{source.path} has its neurons in that order already.")
    if sparsity is None or not (source.path / ORDER_FILE).is_file():
        raise BundleError(
            f"Which neurons of {source.path} fire together is not known.",
            f"Calibrate it first: genai-run calibrate {source.path}.",
        )
    orders = _orders(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with writer_lock(out):
        recover(out)
        if out.exists() and not overwrite:
            raise BundleError(f"{out} exists already.", "Choose another folder, or add --overwrite.")
        folder = partial_folder(out)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            entries = _files(source, orders, folder, progress)
            parameters = source.manifest.parameters | {"order": ORDER}
            _predictors(source.path, orders, folder)
            write_atomic(
                folder / MANIFEST_FILE, replace(source.manifest, files=entries, parameters=parameters).to_json()
            )
            write_atomic(folder / SPARSITY_FILE, sparsity_json(replace(sparsity, manifest=manifest_digest(folder))))
            publish_folder(out, overwrite=overwrite)
        except OSError as error:
            raise StorageError(f"Writing the bundle failed: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return out


def _orders(source: BundleCheckpoint) -> dict[int, np.ndarray]:
    """By layer, which neuron stands at each place."""
    file, again = source.path / ORDER_FILE, "Calibrate the bundle again."
    try:
        found = {int(name): value for name, value in load_file(file).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {error}.", again) from None
    for layer, order in found.items():
        layout = source.records.get(layer)
        if layout is None or not np.array_equal(np.sort(order), np.arange(layout.count)):
            raise BundleError(f"{file} is not of this bundle.", again)
    return found


def _files(
    source: BundleCheckpoint, orders: Mapping[int, np.ndarray], folder: Path, progress: Progress | None
) -> dict[str, FileEntry]:
    manifest, entries, done = source.manifest, {}, 0
    total = sum(entry.bytes for entry in manifest.files.values())
    moved = {manifest.records[layer].file: layer for layer in orders}
    patches = _biases(source, orders)
    for name in manifest.files:
        with HashedFile(folder / name) as output:
            if name in moved:
                _write_records(source, moved[name], orders[moved[name]], output)
            else:
                _copy(source.path / name, patches.get(name, []), output)
        entries[name] = output.entry
        done += output.size
        if progress is not None:
            progress(done, total, name)
    return entries


def _write_records(source: BundleCheckpoint, layer: int, order: np.ndarray, output: HashedFile) -> None:
    layout = source.records[layer]
    info = source.tensors[layout.tensor]
    output.write(np.fromfile(info.path, np.uint8, info.offset))
    rows = np.memmap(info.path, np.uint8, "r", info.offset, (layout.count, layout.width_bytes))
    step = max(1, _BLOCK // layout.width_bytes)
    for first in range(0, layout.count, step):
        output.write(rows[order[first : first + step]])
    end = info.offset + layout.count * layout.width_bytes
    if info.path.stat().st_size > end:
        output.write(np.fromfile(info.path, np.uint8, offset=end))


def _biases(source: BundleCheckpoint, orders: Mapping[int, np.ndarray]) -> dict[str, _Patches]:
    """Biases of gate and up, in the new order, by file."""
    found: dict[str, _Patches] = {}
    for layer, order in orders.items():
        for role in ("gate.bias", "up.bias"):
            ref = source.weights.layers[layer].get(role)
            if ref is None:
                continue
            info = source.tensors[ref.tensor]
            extent = info.rows(ref.row, ref.rows)
            stored = np.fromfile(info.path, np.uint8, extent.nbytes, offset=extent.offset).reshape(len(order), -1)
            found.setdefault(info.path.name, []).append((extent.offset, stored[order].reshape(-1)))
    return found


def _copy(path: Path, patches: _Patches, output: HashedFile) -> None:
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    place = 0
    for offset, patch in [*sorted(patches, key=lambda each: each[0]), (len(data), np.empty(0, np.uint8))]:
        for first in range(place, offset, _BLOCK):
            output.write(np.array(data[first : min(first + _BLOCK, offset)]))
        if len(patch):
            output.write(patch)
        place = offset + len(patch)


def _predictors(bundle: Path, orders: Mapping[int, np.ndarray], folder: Path) -> None:
    tensors = load_file(bundle / PREDICTORS_FILE)
    for layer, order in orders.items():
        for name in (predictor_tensor(tensors, layer, "b"), f"layers.{layer}.bias"):
            tensors[name] = tensors[name][order]
    save_file(tensors, folder / PREDICTORS_FILE)
