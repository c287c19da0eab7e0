"""Which weight goes to which byte of which file: the bundle laid out from the checkpoint's headers, nothing read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from ..checkpoint.base import FORMATS, PLAIN, Checkpoint, TensorInfo
from ..config import ModelConfig, WeightMap, WeightRef
from ..errors import BundleError, CorruptCheckpointError, UnsupportedModelError, UsageError
from .convert import rounds
from .format import (
    TRUNK_FILE,
    RecordLayout,
    StoredFormat,
    align_up,
    expert_layout,
    format_bytes,
    is_blocks,
    neuron_layout,
    safetensors_header,
)

DTYPES = ("auto", "f32", "f16", "bf16")
FFN = ("gate", "up", "down")  # the order within a record
_EXPERT = re.compile(r"experts\.(\d+)\.(gate|up|down)")
# Forward order of the trunk; roles of neither list follow in alphabetical order.
_BEFORE = ("embed", "project_in", "positions")
_AFTER = ("final_norm", "project_out", "head")
_LAYER = (
    "attn_norm", "qkv", "q", "k", "v", "q_norm", "k_norm", "o", "attn_post_norm", "ffn_norm", "router",
    "gate", "up", "down", "shared_gate", "shared.gate", "shared.up", "shared.down", "ffn_post_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Rows [row, row + rows) of a source tensor."""

    info: TensorInfo
    row: int
    rows: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.info.row_bytes


@dataclass(frozen=True)
class TrunkContent:
    """Tensors that are copied as they are, in order; an int is that many zero bytes between them."""

    pieces: tuple[Rows | int, ...]


@dataclass(frozen=True)
class NeuronContent:
    """One dense layer: its layout and the source of each part, by role."""

    layout: RecordLayout
    sources: dict[str, Rows]


@dataclass(frozen=True)
class ExpertContent:
    """One layer of experts: its layout and, by expert, the source of each part in the layout's order."""

    layout: RecordLayout
    experts: tuple[tuple[Rows, ...], ...]


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file to write: `nbytes` in all, of which `header` comes first."""

    name: str
    nbytes: int
    header: bytes
    content: TrunkContent | NeuronContent | ExpertContent


@dataclass(frozen=True)
class BundlePlan:
    """What a bundle will be. Sizes are in bytes, of weights with their headers; the model's small files come on top."""

    parameters: dict[str, str]
    exactness: Literal["exact", "quantized"]
    files: tuple[PlannedFile, ...]
    weights: WeightMap
    formats: dict[str, StoredFormat]
    records: dict[int, RecordLayout]

    @property
    def total_bytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def plan_bundle(checkpoint: Checkpoint, config: ModelConfig, weights: WeightMap, *, dtype: str = "auto") -> BundlePlan:
    """Lay a bundle out without reading weights.

    `dtype` (auto, f32, f16, bf16) is that of the streamed weights of dense layers and of experts that are plain. `auto`
    is the source's own, F16 for dense layers from GGUF blocks; experts in blocks always stay as they are, and so does
    the trunk. Raises UsageError on another dtype, BundleError for a bundle as the source, CorruptCheckpointError and
    UnsupportedModelError when the weights do not fit together.
    """
    if dtype.lower() not in DTYPES:
        raise UsageError(f"--dtype is '{dtype}', which is none of {', '.join(DTYPES)}.")
    if checkpoint.kind == "bundle":
        raise BundleError(f"{checkpoint.path} is a bundle already.", "Make bundles from the original checkpoint.")
    if len(weights.layers) != config.num_hidden_layers:
        raise CorruptCheckpointError(
            f"The configuration says {config.num_hidden_layers} layers, the weights have {len(weights.layers)}."
        )
    target = None if dtype.lower() == "auto" else dtype.upper()
    streamed: list[PlannedFile] = []
    records: dict[int, RecordLayout] = {}
    exact = True
    for layer, roles in enumerate(weights.layers):
        content = _stream(layer, checkpoint.tensors, config, roles, target)
        if content is None:
            continue
        layout = records[layer] = content.layout
        header = safetensors_header([(layout.tensor, layout.format, layout.shape)])
        size = len(header) + layout.count * layout.width_bytes
        streamed.append(PlannedFile(layout.file, size, header, content))
        exact = exact and not _rounded(content)
    trunk, trunk_weights, formats = _trunk(checkpoint.tensors, weights)
    return BundlePlan(
        {"dtype": dtype.lower()}, "exact" if exact else "quantized", (trunk, *streamed), trunk_weights, formats, records
    )


def _is_streamed(role: str) -> bool:
    return role in FFN or _EXPERT.fullmatch(role) is not None


def _locate(tensors: Mapping[str, TensorInfo], ref: WeightRef) -> Rows:
    info = tensors.get(ref.tensor)
    if info is None:
        raise CorruptCheckpointError(f"The checkpoint has no tensor '{ref.tensor}'.")
    if info.format not in FORMATS:
        raise UnsupportedModelError(f"The tensor '{ref.tensor}' is {info.format}, a format that is not supported.")
    if ref.cols != info.cols or ref.rows < 1 or ref.row < 0 or ref.row + ref.rows > info.num_rows:
        raise CorruptCheckpointError(
            f"The tensor '{ref.tensor}' has shape {list(info.shape)}, "
            f"which does not hold rows {ref.row} to {ref.row + ref.rows} of {ref.cols} elements."
        )
    return Rows(info, ref.row, ref.rows)


# ------------------------------------------------------------------ what streams


def _stream(
    layer: int, tensors: Mapping[str, TensorInfo], config: ModelConfig, roles: dict[str, WeightRef], target: str | None
) -> NeuronContent | ExpertContent | None:
    numbers = {int(match[1]) for role in roles if (match := _EXPERT.fullmatch(role))}
    if not numbers:
        dense = {role: _locate(tensors, roles[role]) for role in FFN if role in roles}
        return _neurons(layer, dense, target) if dense else None
    count = config.moe.num_experts if config.moe is not None else len(numbers)
    if numbers != set(range(count)):
        raise CorruptCheckpointError(f"Layer {layer} has {len(numbers)} experts, not the {count} of the configuration.")
    experts: list[tuple[Rows, ...]] = []
    names = [part for part in FFN if f"experts.0.{part}" in roles]
    for expert in range(count):
        missing = [part for part in names if f"experts.{expert}.{part}" not in roles]
        if missing:
            raise CorruptCheckpointError(f"Expert {expert} of layer {layer} has no '{missing[0]}' matrix.")
        experts.append(tuple(_locate(tensors, roles[f"experts.{expert}.{part}"]) for part in names))
    return _experts(layer, names, tuple(experts), target)


def _streamable(sources: Iterable[Rows]) -> None:
    for rows in sources:
        if rows.info.format not in PLAIN and not is_blocks(rows.info.format):
            raise UnsupportedModelError(
                f"The tensor '{rows.info.name}' is {rows.info.format}; FFN weights are floating point or GGUF blocks."
            )


def _neurons(layer: int, sources: dict[str, Rows], target: str | None) -> NeuronContent:
    if "up" not in sources or "down" not in sources:
        raise CorruptCheckpointError(
            f"Layer {layer} has no {'down' if 'up' in sources else 'up'} projection in its FFN."
        )
    _streamable(sources.values())
    up, down = sources["up"], sources["down"]
    for role in ("gate", "up"):
        if role in sources and sources[role].rows != down.info.cols:
            raise CorruptCheckpointError(
                f"'{sources[role].info.name}' has {sources[role].rows} neurons, "
                f"'{down.info.name}' has {down.info.cols}."
            )
    if target is None:
        formats = {rows.info.format for rows in sources.values()}
        if any(is_blocks(format) for format in formats):
            target = "F16"
        else:  # mixed plain dtypes: the one that holds them all
            target = formats.pop() if len(formats) == 1 else "F32"
    # A neuron is a row of gate and up and a column of down, which is as long as down has rows.
    widths = [(role, down.rows if role == "down" else rows.info.cols) for role, rows in sources.items()]
    return NeuronContent(neuron_layout(layer, up.rows, target, widths), sources)


def _experts(layer: int, names: list[str], experts: tuple[tuple[Rows, ...], ...], target: str | None) -> ExpertContent:
    parts = []
    for index, role in enumerate(names):
        column = [expert[index] for expert in experts]
        _streamable(column)
        first = column[0]
        for rows in column[1:]:
            if (rows.rows, rows.info.cols, rows.info.format) != (first.rows, first.info.cols, first.info.format):
                raise CorruptCheckpointError(
                    f"'{rows.info.name}' is {rows.info.format} [{rows.rows}, {rows.info.cols}], unlike "
                    f"'{first.info.name}' of another expert: {first.info.format} [{first.rows}, {first.info.cols}]."
                )
        stored = first.info.format if target is None or is_blocks(first.info.format) else target
        parts.append((role, first.rows, first.info.cols, stored))
    return ExpertContent(expert_layout(layer, len(experts), parts), experts)


def _rounded(content: NeuronContent | ExpertContent) -> bool:
    sources = content.sources.values() if isinstance(content, NeuronContent) else content.experts[0]
    return any(
        part.format != rows.info.format and rounds(rows.info.format, part.format)
        for part, rows in zip(content.layout.parts, sources, strict=True)
    )


# ------------------------------------------------------------------ what stays


def _ordered(roles: Iterable[str], order: tuple[str, ...]) -> list[str]:
    def key(role: str) -> tuple[int, str, bool]:
        base = role.removesuffix(".bias")
        return order.index(base) if base in order else len(order), base, role != base

    return sorted(roles, key=key)


def _trunk(
    tensors: Mapping[str, TensorInfo], weights: WeightMap
) -> tuple[PlannedFile, WeightMap, dict[str, StoredFormat]]:
    pieces: list[Rows | int] = []
    header: list[tuple[str, str, tuple[int, ...]]] = []
    formats: dict[str, StoredFormat] = {}
    placed: dict[
        tuple[str, int, int], str
    ] = {}  # rows of the source -> their tensor here, so that a tied head is stored once
    offset = 0

    def place(role: str, ref: WeightRef) -> WeightRef:
        nonlocal offset
        rows = _locate(tensors, ref)
        info, key = rows.info, (ref.tensor, ref.row, ref.rows)
        if key not in placed:
            whole = rows.rows == info.num_rows
            name = placed[key] = ref.tensor if whole else f"{ref.tensor}.{role}"
            shape = (info.shape or (1,)) if whole else (rows.rows, info.cols)
            dtype = info.format
            if is_blocks(dtype):
                formats[name] = StoredFormat(dtype, shape)
                dtype, shape = "U8", (prod(shape[:-1]), format_bytes(dtype, shape[-1]))
            # Blocks can have odd sizes, and some readers view the data as the dtype: its elements are kept aligned.
            gap = align_up(offset, FORMATS[dtype][1]) - offset
            if gap:
                header.append((f"padding.{len(header)}", "U8", (gap,)))
                pieces.append(gap)
            header.append((name, dtype, shape))
            pieces.append(rows)
            offset += gap + rows.nbytes
        return WeightRef(placed[key], 0, ref.rows, ref.cols)

    def place_all(roles: dict[str, WeightRef], order: list[str]) -> dict[str, WeightRef]:
        return {role: place(role, roles[role]) for role in order}

    ahead = [role for role in weights.model if role.removesuffix(".bias") in _BEFORE]
    model = place_all(weights.model, _ordered(ahead, _BEFORE))
    layers = tuple(
        place_all(roles, _ordered((role for role in roles if not _is_streamed(role)), _LAYER))
        for roles in weights.layers
    )
    model |= place_all(weights.model, _ordered((role for role in weights.model if role not in ahead), _AFTER))
    data = safetensors_header(header)
    file = PlannedFile(TRUNK_FILE, len(data) + offset, data, TrunkContent(tuple(pieces)))
    return file, WeightMap(model, layers), formats
