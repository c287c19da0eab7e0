"""Which weight goes to which byte of which file: the bundle laid out from the checkpoint's headers, nothing read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from ..checkpoint.base import FORMATS, PLAIN, Checkpoint, TensorInfo
from ..config import ModelConfig, WeightMap, WeightRef
from ..errors import BundleError, CorruptCheckpointError, UnsupportedModelError, UsageError
from .convert import rounds
from .format import (
    MATRICES,
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
from .layout import BundlePlan, ExpertContent, MatrixContent, NeuronContent, Piece, PlannedFile, Rows
from .quantize import Quantization, Quantize, format_of

DTYPES = ("auto", "f32", "f16", "bf16")
FFN = ("gate", "up", "down")  # the order within a record
# What `--quantize-trunk` rounds: matrices that are large. Norms, biases, routers and tables of positions stay.
_ROUNDED = frozenset(
    (
        "q",
        "q_a",
        "q_b",
        "k",
        "v",
        "qkv",
        "kv_a",
        "kv_b",
        "k_b",
        "v_b",
        "o",
        "embed",
        "head",
        "project_in",
        "project_out",
        "shared.gate",
        "shared.up",
        "shared.down",
    )
)
MOST_PADDED = 1.06  # a quantised record may be so much longer for its alignment, or matrices are kept instead
_SPARSE = ("relu", "relu2")  # activations whose neurons are worth reading one by one
# The order within an expert's record.
EXPERT = ("gate", "gate.bias", "up", "up.bias", "gate_up", "gate_up.bias", "down", "down.bias")
_EXPERT = re.compile(r"experts\.(\d+)\.(?:gate|up|gate_up|down)(?:\.bias|\.scales)?")
# Forward order of the trunk; roles of neither list follow in alphabetical order.
_BEFORE = ("embed", "project_in", "positions")
_AFTER = ("final_norm", "project_out", "head")
_LAYER = (
    "attn_norm", "qkv", "q", "q_a", "q_a_norm", "q_b", "k", "v", "kv_a", "kv_a_norm", "kv_b", "k_b", "v_b",
    "q_norm", "k_norm",
    "sinks", "o", "attn_post_norm", "ffn_norm", "router",
    "gate", "up", "down", "shared_gate", "shared.gate", "shared.up", "shared.down", "ffn_post_norm",
)  # fmt: skip


def plan_bundle(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightMap,
    *,
    dtype: str = "auto",
    quantization: Quantization | None = None,
) -> BundlePlan:
    """Lay a bundle out without reading weights.

    `dtype` (auto, f32, f16, bf16) is that of the streamed weights of dense layers and of experts that are plain; `auto`
    is the source's own. `quantization` says what becomes int8 or int4 instead. GGUF blocks stay as they are, a dense
    layer of them as matrices instead of neuron records, as is one whose quantised records would be padding in good
    part; except that a `dtype`, or an activation of which neurons can be skipped, makes records of them, and that int4
    rounds blocks of 8 bits. Raises UsageError on another dtype or on one beside quantized experts, BundleError for a
    bundle as the source, CorruptCheckpointError and UnsupportedModelError when the weights do not fit together.
    """
    quantization = quantization or Quantization()
    if dtype.lower() not in DTYPES:
        raise UsageError(f"--dtype is '{dtype}', which is none of {', '.join(DTYPES)}.")
    if dtype.lower() != "auto" and quantization.experts != "none":
        raise UsageError(
            f"--dtype {dtype} and {quantization.experts} both say what becomes of the streamed weights.",
            "Leave one out, or add --quantize-experts none to quantize the trunk alone.",
        )
    if checkpoint.kind == "bundle":
        raise BundleError(f"{checkpoint.path} is a bundle already.", "Make bundles from the original checkpoint.")
    if len(weights.layers) != config.num_hidden_layers:
        raise CorruptCheckpointError(
            f"The configuration says {config.num_hidden_layers} layers, the weights have {len(weights.layers)}."
        )
    target = None if dtype.lower() == "auto" else dtype.upper()
    planner = _Planner(checkpoint.tensors, config, target, quantization)
    files, weights = planner.files(weights)
    return BundlePlan(
        {"dtype": dtype.lower(), **quantization.parameters},
        "exact" if planner.exact else "quantized",
        files,
        weights,
        planner.formats,
        planner.records,
        planner.small,
        tuple(planner.notes),
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


def _streamable(sources: Iterable[Rows]) -> None:
    for rows in sources:
        if rows.format not in PLAIN and not is_blocks(rows.format):
            raise UnsupportedModelError(
                f"The tensor '{rows.info.name}' is {rows.format}; FFN weights are floating point or GGUF blocks."
            )


def _is_kept(format: str, quantize: Quantize) -> bool:
    """Does a matrix in GGUF blocks stay as it is? Not those of 8 bits where 4 are asked for."""
    elements, size = FORMATS[format]
    return is_blocks(format) and not (quantize == "int4" and size >= elements)


def _ordered(roles: Iterable[str], order: tuple[str, ...]) -> list[str]:
    def key(role: str) -> tuple[int, str, bool]:
        base = role.removesuffix(".bias")
        return order.index(base) if base in order else len(order), base, role != base

    return sorted(roles, key=key)


class _Matrices:
    """A safetensors file of whole matrices, tensor by tensor."""

    def __init__(self, planner: _Planner) -> None:
        self.planner = planner
        self.pieces: list[Piece | int] = []
        self.header: list[tuple[str, str, tuple[int, ...]]] = []
        self.placed: dict[tuple[str, int, int], str] = {}  # rows of the source -> their tensor: a tied head once
        self.offset = 0

    def place(self, role: str, ref: WeightRef, quantize: Quantize) -> WeightRef:
        """Append a weight, unless it is there already; where it stands now."""
        rows = _locate(self.planner.tensors, ref)
        info, key = rows.info, (ref.tensor, ref.row, ref.rows)
        if key not in self.placed:
            whole = rows.rows == info.num_rows
            name = self.placed[key] = ref.tensor if whole else f"{ref.tensor}.{role}"
            shape = (info.shape or (1,)) if whole else (rows.rows, info.cols)
            format = dtype = self.planner.format(role, rows, quantize)
            if is_blocks(dtype):
                self.planner.formats[name] = StoredFormat(dtype, shape)
                dtype, shape = "U8", (prod(shape[:-1]), format_bytes(dtype, shape[-1]))
            # Blocks can have odd sizes, and some readers view the data as the dtype: its elements are kept aligned.
            gap = align_up(self.offset, FORMATS[dtype][1]) - self.offset
            if gap:
                self.header.append((f"padding.{len(self.header)}", "U8", (gap,)))
                self.pieces.append(gap)
            self.header.append((name, dtype, shape))
            self.pieces.append(Piece(rows, format))
            self.offset += gap + self.pieces[-1].nbytes  # type: ignore[union-attr]
        return WeightRef(self.placed[key], 0, ref.rows, ref.cols)

    def file(self, name: str) -> PlannedFile:
        data = safetensors_header(self.header)
        content = MatrixContent(tuple(self.pieces))
        return PlannedFile(name, len(data) + self.offset, data, content, self.planner.quantization.rounding)


class _Planner:
    """Decides file by file, and gathers what the manifest and the user are told."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        config: ModelConfig,
        target: str | None,
        quantization: Quantization,
    ) -> None:
        self.tensors, self.config, self.target, self.quantization = tensors, config, target, quantization
        self.formats: dict[str, StoredFormat] = {}
        self.records: dict[int, RecordLayout] = {}
        self.small: dict[int, RecordLayout] = {}
        self.notes: dict[str, None] = {}
        self.exact = True

    def files(self, weights: WeightMap) -> tuple[tuple[PlannedFile, ...], WeightMap]:
        """All files, the trunk first, and where weights that are no records stand in them."""
        streamed: list[PlannedFile] = []
        kept: list[dict[str, WeightRef]] = []
        for layer, roles in enumerate(weights.layers):
            content, matrices = self._stream(layer, roles), {}
            if isinstance(content, dict):
                own = _Matrices(self)
                matrices = {role: own.place(role, roles[role], self.quantization.experts) for role in content}
                streamed.append(own.file(f"{MATRICES}{layer:03}.safetensors"))
            elif content is not None:
                self.records[layer] = content.layout
                streamed.append(self._file(content))
                small = self._small(layer, content) if isinstance(content, ExpertContent) else None
                if small is not None:
                    self.small[layer] = small.layout
                    streamed.append(self._file(small))
            kept.append(matrices)
        trunk, placed = self._trunk(weights)
        layers = tuple(stays | matrices for stays, matrices in zip(placed.layers, kept, strict=True))
        return (trunk, *streamed), WeightMap(placed.model, layers)

    def _file(self, content: NeuronContent | ExpertContent) -> PlannedFile:
        layout = content.layout
        header = safetensors_header([(layout.tensor, layout.format, layout.shape)])
        size = len(header) + layout.count * layout.width_bytes
        return PlannedFile(layout.file, size, header, content, self.quantization.rounding)

    def format(self, role: str, rows: Rows, quantize: Quantize) -> str:
        """What a matrix becomes: the blocks asked for where its columns allow it, else what it is."""
        source, cols = rows.format, rows.shape[1]
        if quantize == "none" or _is_kept(source, quantize):
            return source
        found = format_of(quantize, cols)
        if found is None:
            what = f"Rows of {cols} elements are no multiple of 32: they cannot become {quantize} and stay {source}"
            self.notes[f"{what} ({role})."] = None
            return source
        self.exact = False
        return found

    # ---- what streams
    def _stream(
        self, layer: int, roles: dict[str, WeightRef]
    ) -> NeuronContent | ExpertContent | dict[str, Rows] | None:
        """The layer's records, or its matrices where these stay."""
        numbers = {int(match[1]) for role in roles if (match := _EXPERT.fullmatch(role))}
        if not numbers:
            dense = {role: _locate(self.tensors, roles[role]) for role in FFN if role in roles}
            return self._dense(layer, dense) if dense else None
        count = self.config.moe.num_experts if self.config.moe is not None else len(numbers)
        if numbers != set(range(count)):
            raise CorruptCheckpointError(
                f"Layer {layer} has {len(numbers)} experts, not the {count} of the configuration."
            )
        experts: list[tuple[Rows, ...]] = []
        names = [part for part in EXPERT if f"experts.0.{part}" in roles]
        for expert in range(count):
            missing = [part for part in names if f"experts.{expert}.{part}" not in roles]
            if missing:
                raise CorruptCheckpointError(f"Expert {expert} of layer {layer} has no '{missing[0]}' matrix.")
            experts.append(tuple(self._matrix(roles, f"experts.{expert}.{part}") for part in names))
        return self._experts(layer, names, tuple(experts))

    def _matrix(self, roles: dict[str, WeightRef], role: str) -> Rows:
        rows, scales = _locate(self.tensors, roles[role]), roles.get(f"{role}.scales")
        return replace(
            rows, turned=roles[role].turned, scales=None if scales is None else _locate(self.tensors, scales)
        )

    def _dense(self, layer: int, sources: dict[str, Rows]) -> NeuronContent | dict[str, Rows]:
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
        quantize = self.quantization.experts
        formats = {rows.info.format for rows in sources.values()}
        sparse = self.config.hidden_act in _SPARSE
        if self.target is None and not sparse and any(_is_kept(format, quantize) for format in formats):
            return sources
        target = self.target
        if quantize != "none":
            target = format_of(quantize, up.info.cols)
            if target is None:
                self.notes[
                    f"Rows of {up.info.cols} elements are no multiple of 32: neurons cannot become {quantize} and stay "
                    "plain."
                ] = None
        if target is None:
            if any(is_blocks(format) for format in formats):
                target = "F16"
            else:  # mixed plain dtypes: the one that holds them all
                target = next(iter(formats)) if len(formats) == 1 else "F32"
        # A neuron is a row of gate and up and a column of down, which is as long as down has rows.
        widths = [(role, down.rows if role == "down" else rows.info.cols) for role, rows in sources.items()]
        layout = neuron_layout(layer, up.rows, target, widths)
        if is_blocks(target) and not sparse and layout.width_bytes > MOST_PADDED * sum(p.nbytes for p in layout.parts):
            return sources
        self.exact = self.exact and not any(rounds(format, target) for format in formats)
        return NeuronContent(layout, sources)

    def _experts(self, layer: int, names: list[str], experts: tuple[tuple[Rows, ...], ...]) -> ExpertContent:
        parts = []
        for index, role in enumerate(names):
            column = [expert[index] for expert in experts]
            _streamable(column)
            first = column[0]
            for rows in column[1:]:
                if (rows.shape, rows.format) != (first.shape, first.format):
                    raise CorruptCheckpointError(
                        f"'{rows.info.name}' is {rows.format} {list(rows.shape)}, unlike "
                        f"'{first.info.name}' of another expert: {first.format} {list(first.shape)}."
                    )
            quantize: Quantize = "none" if role.endswith(".bias") else self.quantization.experts
            stored = self.format(f"{role} of experts", first, quantize)
            if self.target is not None and not is_blocks(stored):
                self.exact = self.exact and not rounds(stored, self.target)
                stored = self.target
            parts.append((role, *first.shape, stored))
        return ExpertContent(expert_layout(layer, len(experts), parts), experts)

    def _small(self, layer: int, content: ExpertContent) -> ExpertContent | None:
        """The layer's experts in fewer bits; None where that is not asked for or gives nothing."""
        quantize = self.quantization.small
        if quantize == "none":
            return None
        parts = []
        for part in content.layout.parts:
            smaller = None if part.role.endswith(".bias") else format_of(quantize, part.cols)
            if smaller is not None and format_bytes(smaller, part.cols) >= format_bytes(part.format, part.cols):
                smaller = None
            parts.append((part.role, part.rows, part.cols, smaller or part.format))
        layout = expert_layout(layer, content.layout.count, parts, "small")
        if layout.width_bytes >= content.layout.width_bytes:
            self.notes[f"Experts of {content.layout.parts[0].format} become no smaller as {quantize}: no copies."] = (
                None
            )
            return None
        return ExpertContent(layout, content.experts)

    # ---- what stays
    def _trunk(self, weights: WeightMap) -> tuple[PlannedFile, WeightMap]:
        trunk = _Matrices(self)

        def place_all(roles: dict[str, WeightRef], order: list[str]) -> dict[str, WeightRef]:
            return {
                role: trunk.place(role, roles[role], self.quantization.trunk if role in _ROUNDED else "none")
                for role in order
            }

        ahead = [role for role in weights.model if role.removesuffix(".bias") in _BEFORE]
        model = place_all(weights.model, _ordered(ahead, _BEFORE))
        layers = tuple(
            place_all(roles, _ordered((role for role in roles if not _is_streamed(role)), _LAYER))
            for roles in weights.layers
        )
        model |= place_all(weights.model, _ordered((role for role in weights.model if role not in ahead), _AFTER))
        return trunk.file(TRUNK_FILE), WeightMap(model, layers)
