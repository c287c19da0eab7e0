"""The header of one GGUF file: key-values and the table of tensors, read in order through a buffer of one MiB.

The file is taken for hostile: counts and lengths are checked against the bytes left before anything is made of them.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CorruptCheckpointError, UnsupportedModelError
from .base import FORMATS, TensorInfo
from .files import opened, quoted

# Types of metadata values. 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# ggml types that we read, by number. Their order and the gaps are ggml's history.
GGML_FORMATS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    30: "BF16", 39: "MXFP4",
}  # fmt: skip
_BUFFER = 1 << 20
_MOST_STRING = 1 << 27  # bytes; tokenizer.huggingface.json has tens of megabytes
_MOST_ELEMENTS = 1 << 25  # of an array; vocabularies have under a million
_MOST_KEYS, _MOST_TENSORS = 1 << 16, 1 << 20
_LEAST_ENTRY = 24  # bytes of the shortest entry in the table of tensors


@dataclass(frozen=True)
class GgufHeader:
    """What a file says before its data: values are int, float, bool, str, list[str] or a numpy array."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """Reads forward through a file, never past its end, with one buffer."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path = file, size, path
        self.buffer, self.at, self.start = b"", 0, 0  # position in the buffer, and of the buffer in the file

    @property
    def position(self) -> int:
        return self.start + self.at

    def need(self, nbytes: int, what: str) -> None:
        """Make `nbytes` more stand in the buffer."""
        if len(self.buffer) - self.at >= nbytes:
            return
        if nbytes > self.size - self.position:
            raise CorruptCheckpointError(
                f"{self.path} ends at byte {self.size}, inside of {what}: it is cut off or its counts lie."
            )
        self.start += self.at
        self.buffer, self.at = self.buffer[self.at :], 0
        while len(self.buffer) < nbytes:
            more = self.file.read(max(_BUFFER, nbytes - len(self.buffer)))
            if not more:
                raise CorruptCheckpointError(f"{self.path} became shorter while it was read.")
            self.buffer += more

    def take(self, nbytes: int, what: str) -> bytes:
        self.need(nbytes, what)
        self.at += nbytes
        return self.buffer[self.at - nbytes : self.at]

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def count(self, most: int, least_bytes: int, what: str) -> int:
        """A count of things of at least `least_bytes` each, no more than the file has room for."""
        found = int(self.number("<Q", what))
        if found > most or found * least_bytes > self.size - self.position:
            raise CorruptCheckpointError(f"{self.path} claims {found} {what}, more than can be.")
        return found

    def text(self, what: str, *, strict: bool = False) -> str:
        raw = self.take(self.count(_MOST_STRING, 1, f"bytes in {what}"), what)
        try:
            return raw.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError as error:
            raise CorruptCheckpointError(f"{self.path} has {what} that is not UTF-8 text.") from error

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings. The loop is the whole cost of opening a file, so it works on the buffer itself."""
        found: list[str] = []
        unpack, buffer, at = struct.Struct("<Q").unpack_from, self.buffer, self.at
        for _ in range(count):
            if len(buffer) - at < 8:
                self.at = at
                self.need(8, what)
                buffer, at = self.buffer, self.at
            length = unpack(buffer, at)[0]
            at += 8
            if len(buffer) - at < length:
                self.at = at
                if length > _MOST_STRING:
                    raise CorruptCheckpointError(f"{self.path} claims a string of {length} bytes in {what}.")
                self.need(length, what)
                buffer, at = self.buffer, self.at
            found.append(buffer[at : at + length].decode("utf-8", "replace"))
            at += length
        self.at = at
        return found

    def value(self, kind: int, key: str) -> Any:
        what = quoted(key)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise CorruptCheckpointError(f"{self.path} gives {what} the unknown type {kind}.")
        inner = int(self.number("<I", what))
        if inner == _STRING:
            return self.texts(self.count(_MOST_ELEMENTS, 8, f"strings in {what}"), what)
        if inner not in _SCALARS:
            raise CorruptCheckpointError(f"{self.path} gives {what} an array of type {inner}, which there is not.")
        dtype = np.dtype(_SCALARS[inner])
        count = self.count(_MOST_ELEMENTS, dtype.itemsize, f"values in {what}")
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)


def _check_version(cursor: _Cursor) -> None:
    path = cursor.path
    magic = cursor.take(4, "the magic") if cursor.size >= 4 else b""
    if magic != b"GGUF":
        raise CorruptCheckpointError(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
    version = cursor.number("<I", "the version")
    if version & 0xFFFF == 0:
        raise UnsupportedModelError(
            f"{path} is a big-endian GGUF file, which is not supported.",
            "Convert it with gguf-convert-endian FILE little.",
        )
    if version not in (2, 3):
        hint = "Convert the original model again." if version == 1 else None
        raise UnsupportedModelError(f"{path} is of GGUF version {version}; 2 and 3 are supported.", hint)


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"ggml type {number}"


def _entry(cursor: _Cursor) -> TensorInfo:
    """One row of the table; `offset` still counts from the start of the data."""
    name = cursor.text("a tensor's name", strict=True)
    where = f"{cursor.path}: tensor {quoted(name)}"
    dimensions = int(cursor.number("<I", where))
    if dimensions > 4:
        raise CorruptCheckpointError(f"{where} has {dimensions} dimensions; there are at most 4.")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, where))[::-1]  # ggml has the fastest one first
    kind, offset = cursor.number("<I", where), int(cursor.number("<Q", where))
    if kind not in GGML_FORMATS:
        known = ", ".join(name for name in GGML_FORMATS.values() if not name.startswith("I") or name.startswith("IQ"))
        raise UnsupportedModelError(
            f"{where} has the type {_type_name(kind)}, which is not supported.",
            f"Supported are {known}.",
        )
    elements, size = FORMATS[GGML_FORMATS[kind]]
    total = 1
    for length in shape:
        total *= length
    if total > 1 << 62:
        raise CorruptCheckpointError(f"{where} has the shape {list(shape)}, which cannot be.")
    if (shape[-1] if shape else 1) % elements:
        raise CorruptCheckpointError(
            f"{where} has rows of {shape[-1]} values, no multiple of the {elements} in a block."
        )
    return TensorInfo(name, GGML_FORMATS[kind], shape, cursor.path, offset, total // elements * size)


def _place(entries: list[TensorInfo], data: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """The tensors with offsets counted from the start of the file, each aligned, inside of the file, and apart."""
    tensors: dict[str, TensorInfo] = {}
    for info in entries:
        where = f"{info.path}: tensor {quoted(info.name)}"
        if info.name in tensors:
            raise CorruptCheckpointError(f"{where} is there twice.")
        if info.offset % alignment:
            raise CorruptCheckpointError(f"{where} begins at {info.offset}, no multiple of the alignment {alignment}.")
        begin = data + info.offset
        if begin + info.nbytes > size:
            raise CorruptCheckpointError(
                f"{where} ends at byte {begin + info.nbytes}, the file at {size}: it is cut off or its header lies."
            )
        tensors[info.name] = TensorInfo(info.name, info.format, info.shape, info.path, begin, info.nbytes)
    end = data
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset < end:
            raise CorruptCheckpointError(f"{info.path}: tensor {quoted(info.name)} overlaps the one before it.")
        end = info.offset + info.nbytes
    return tensors


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensors of one file; shapes have the slowest dimension first, [out, in] for a projection.

    Raises CorruptCheckpointError for a header that contradicts the file or itself, UnsupportedModelError for big-endian
    files, other versions, and types of tensors that FORMATS lacks, naming the tensor and the type.
    """
    with opened(path) as (file, size):
        cursor = _Cursor(file, size, path)
        _check_version(cursor)
        tensor_count = cursor.count(_MOST_TENSORS, _LEAST_ENTRY, "tensors")
        key_count = cursor.count(_MOST_KEYS, 13, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.text("a key", strict=True)
            if key in metadata:
                raise CorruptCheckpointError(f"{path} has the key {quoted(key)} twice.")
            metadata[key] = cursor.value(int(cursor.number("<I", quoted(key))), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise CorruptCheckpointError(f"{path} has the alignment {alignment!r}, which is no power of two.")
        entries = [_entry(cursor) for _ in range(tensor_count)]
        data = -(-cursor.position // alignment) * alignment
        return GgufHeader(metadata, _place(entries, data, alignment, size))
