"""What a bundle is on disk: its manifest, the layout of its records, and safetensors headers padded to a page.

    OUT/bundle.json               the manifest, written last: without it the folder is no bundle
        config.json, tokenizer..  the model's own small files
        trunk.safetensors         what always stays: everything but the streamed FFN weights, in forward order
        neurons-003.safetensors   one dense layer, [intermediate_size, width]: a row is gate row | up row | down column
        experts-004.safetensors   one layer of experts, [num_experts, width]: a row is w1 | w3 | w2, as in the source
        small-004.safetensors     the same experts in fewer bits, for --degrade, where they were asked for
        blocks-005.safetensors    one dense layer that keeps its GGUF blocks: gate, up and down as they were

A neuron is 512 n bytes long and an expert 4,096 n, and the data of every file starts on a 4,096-byte boundary, so each
record can be read with direct I/O. Row and column of a neuron lie together as in LLM in a Flash (2312.11514, 3.2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Literal

from ..checkpoint.base import FORMATS
from ..config import WeightMap, WeightRef
from ..errors import BundleError

FORMAT_NAME = "genai-run-bundle"
FORMAT_VERSION = 2  # 2: neuron records in blocks, and files of matrices kept in theirs
MANIFEST_FILE = "bundle.json"
TRUNK_FILE = "trunk.safetensors"
MATRICES = "blocks-"  # beginning of the names of files of matrices
DATA_ALIGNMENT = 4096  # start of the data of every safetensors file
NEURON_ALIGNMENT = 512
EXPERT_ALIGNMENT = 4096
PART_ALIGNMENT = 64  # start of each matrix of an expert: a cache line


@dataclass(frozen=True)
class Source:
    """What a bundle was made from. `fingerprint` is described at `fingerprint.fingerprint`."""

    kind: str
    name: str
    fingerprint: str


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (hexadecimal) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFormat:
    """The real format and shape (in elements) of a tensor that safetensors has as U8 [rows, row_bytes]: blocks."""

    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RecordPart:
    """One matrix of a record: `rows` x `cols` elements of `format`, row-major, `nbytes` from byte `offset` on."""

    role: str  # gate | up | down
    offset: int
    nbytes: int
    rows: int
    cols: int
    format: str


@dataclass(frozen=True)
class RecordLayout:
    """The records of one layer: `count` rows of `width_bytes` in `tensor` of `file`; zeros follow the last part.

    `format` is the dtype safetensors shows: U8 where the parts differ or are blocks.
    """

    kind: Literal["neurons", "experts"]
    file: str
    tensor: str
    count: int
    width_bytes: int
    format: str
    parts: tuple[RecordPart, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """[records, elements of `format` in a record]."""
        return self.count, self.width_bytes // FORMATS[self.format][1]


@dataclass(frozen=True)
class Manifest:
    """Everything `bundle.json` says. `weights` names the trunk's tensors; what streams is in `records`, by layer."""

    source: Source
    parameters: dict[str, str]
    exactness: Literal["exact", "quantized"]
    files: dict[str, FileEntry]
    weights: WeightMap
    formats: dict[str, StoredFormat]
    records: dict[int, RecordLayout]
    small: dict[int, RecordLayout] = field(default_factory=dict)  # experts a second time, in fewer bits

    def to_json(self) -> bytes:
        """The file's bytes: the same for the same content, with no time or path in it."""
        body = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "source": asdict(self.source),
            "parameters": self.parameters,
            "exactness": self.exactness,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "weights": {"model": _refs(self.weights.model), "layers": [_refs(layer) for layer in self.weights.layers]},
            "formats": {name: asdict(stored) for name, stored in self.formats.items()},
            "records": {str(layer): asdict(layout) for layer, layout in self.records.items()},
        }
        if self.small:
            body["small"] = {str(layer): asdict(layout) for layer, layout in self.small.items()}
        return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Read the file's bytes back. Raises BundleError when they are no manifest, or a newer version's."""
        try:
            body = json.loads(data)
            name, version = body["format"], int(body["version"])
        except (ValueError, KeyError, TypeError):
            raise BundleError(f"{MANIFEST_FILE} is damaged: it is not a manifest of a bundle.") from None
        if name != FORMAT_NAME:
            raise BundleError(f"{MANIFEST_FILE} is of another format: '{name}', not {FORMAT_NAME}.")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"The bundle has format version {version}; this program reads up to {FORMAT_VERSION}.",
                "Upgrade genai-run, or make the bundle again with this version.",
            )
        try:
            return _manifest(body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{MANIFEST_FILE} is damaged: {error!r}.", "Make the bundle again.") from None


def _refs(roles: Mapping[str, WeightRef]) -> dict[str, dict[str, Any]]:
    """As they have always been written: a bundle has nothing turned."""
    return {role: {k: v for k, v in asdict(ref).items() if k != "turned"} for role, ref in roles.items()}


def _manifest(body: dict[str, Any]) -> Manifest:
    exactness = body["exactness"]
    if exactness not in ("exact", "quantized"):
        raise ValueError(f"exactness {exactness!r}")
    for name in body["files"]:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"file name {name!r}")

    def refs(roles: dict[str, Any]) -> dict[str, WeightRef]:
        return {role: WeightRef(**ref) for role, ref in roles.items()}

    def layout(given: dict[str, Any]) -> RecordLayout:
        return RecordLayout(**{**given, "parts": tuple(RecordPart(**part) for part in given["parts"])})

    def stored(given: dict[str, Any]) -> StoredFormat:
        if given["format"] not in FORMATS:
            raise ValueError(f"format {given['format']!r}")
        return StoredFormat(given["format"], tuple(int(length) for length in given["shape"]))

    return Manifest(
        source=Source(**body["source"]),
        parameters={str(key): str(value) for key, value in body["parameters"].items()},
        exactness=exactness,
        files={name: FileEntry(**entry) for name, entry in body["files"].items()},
        weights=WeightMap(refs(body["weights"]["model"]), tuple(refs(layer) for layer in body["weights"]["layers"])),
        formats={name: stored(given) for name, given in body["formats"].items()},
        records={int(layer): layout(given) for layer, given in body["records"].items()},
        small={int(layer): layout(given) for layer, given in body.get("small", {}).items()},
    )


def align_up(size: int, alignment: int) -> int:
    """The least multiple of `alignment` that is no smaller than `size`."""
    return -(-size // alignment) * alignment


def is_blocks(format: str) -> bool:
    """Is it a format of several elements a block, GGUF's or ours?"""
    return FORMATS[format][0] > 1


def format_bytes(format: str, elements: int) -> int:
    """Bytes of `elements` in a row of `format`; a whole number of blocks."""
    block, size = FORMATS[format]
    assert elements % block == 0, (format, elements)
    return elements // block * size


def safetensors_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length and JSON of a safetensors file holding (name, dtype, shape) in this order without gaps.

    Spaces at the end, which the format allows, make it a multiple of 4,096 bytes long.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    start = 0
    for name, dtype, shape in tensors:
        end = start + prod(shape) * FORMATS[dtype][1]
        assert name not in entries, name
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(align_up(8 + len(text), DATA_ALIGNMENT) - 8)
    return len(text).to_bytes(8, "little") + text


def neuron_layout(layer: int, count: int, dtype: str, parts: Sequence[tuple[str, int]]) -> RecordLayout:
    """Records of one dense layer: `count` neurons, `parts` as (role, elements) in order, all of `dtype`."""
    placed: list[RecordPart] = []
    offset = 0
    for role, cols in parts:
        nbytes = format_bytes(dtype, cols)
        placed.append(RecordPart(role, offset, nbytes, 1, cols, dtype))
        offset += nbytes
    width, name = align_up(offset, NEURON_ALIGNMENT), f"neurons-{layer:03}.safetensors"
    shown = "U8" if is_blocks(dtype) else dtype
    return RecordLayout("neurons", name, f"layers.{layer}.neurons", count, width, shown, tuple(placed))


def expert_layout(
    layer: int, count: int, parts: Sequence[tuple[str, int, int, str]], name: str = "experts"
) -> RecordLayout:
    """Records of one MoE layer: `count` experts, `parts` as (role, rows, cols, format) in record order."""
    placed: list[RecordPart] = []
    offset = 0
    for role, rows, cols, format in parts:
        offset = align_up(offset, PART_ALIGNMENT)
        nbytes = rows * format_bytes(format, cols)
        placed.append(RecordPart(role, offset, nbytes, rows, cols, format))
        offset += nbytes
    formats = {part.format for part in placed}
    dtype = formats.pop() if len(formats) == 1 else "U8"
    if is_blocks(dtype):
        dtype = "U8"
    width, file = align_up(offset, EXPERT_ALIGNMENT), f"{name}-{layer:03}.safetensors"
    return RecordLayout("experts", file, f"layers.{layer}.{name}", count, width, dtype, tuple(placed))
