"""How a checkpoint is cut into what streams and what stays, before a byte of it is loaded.

Matrices become row slices of about SLICE_BYTES; the FFN of a bundle becomes runs of neuron records; experts become the
pieces of a slot; norms, biases and routers always stay. The plan is made from this, then the model is built on it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..bundles.format import RecordLayout
from ..cache.slices import Slice
from ..checkpoint.base import Checkpoint, Extent, TensorInfo
from ..config import SLICE_BYTES, ModelConfig, WeightMap, WeightRef
from ..errors import UsageError
from ..layers.expert import ExpertLayout, ExpertPart
from ..layers.linear import RowSlice

# Small matrices that stay, as float32.
ALWAYS = (
    "sinks", "router", "group_router", "lstm_recurrent", "shared_gate", "positions", "mod_router", "mod_hidden",
    "mod_out",
)  # fmt: skip
ATTENTION = ("q", "q_a", "q_b", "k", "v", "qkv", "kv_a", "kv_b", "k_b", "v_b", "o", "lstm_input")
DENSE = ("gate", "up", "down")
EXPERT = (
    "gate", "gate.bias", "up", "up.bias", "gate_up", "gate_up.scales", "gate_up.bias", "down", "down.scales",
    "down.bias",
)  # fmt: skip
SHARED = ("shared.gate", "shared.up", "shared.down")


@dataclass(frozen=True)
class MatrixLayout:
    """A matrix [rows, cols] cut into row slices."""

    parts: list[RowSlice]
    format: str
    rows: int
    cols: int

    @property
    def slices(self) -> list[Slice]:
        return [part.slice for part in self.parts]


@dataclass
class LayerLayout:
    """One layer: its streamed matrices by role, its records or experts, and the roles that always stay."""

    matrices: dict[str, MatrixLayout] = field(default_factory=dict)
    records: RecordLayout | None = None
    record_parts: tuple[RowSlice, ...] = ()
    expert_extents: list[tuple[Extent, ...]] = field(default_factory=list)
    expert_layouts: list[ExpertLayout] = field(default_factory=list)
    small_extents: list[tuple[Extent, ...]] = field(default_factory=list)  # of the experts' small copies
    small_layouts: list[ExpertLayout] = field(default_factory=list)
    on_demand: bool = False  # a block that tokens may skip: its slices are asked for once one does not
    sparse: bool = False  # its records are asked for neuron by neuron, and whole only for a prompt
    records_base: tuple[Path, int] | None = None  # file and first byte of the records

    @property
    def slices(self) -> list[Slice]:
        """In the order in which the forward pass uses them."""
        found: list[Slice] = []
        for role in (*ATTENTION, *DENSE):
            if role in self.matrices:
                found += self.matrices[role].slices
        found += [part.slice for part in self.record_parts]
        for role in SHARED:
            if role in self.matrices:
                found += self.matrices[role].slices
        return found

    @property
    def demanded(self) -> int:
        """Bytes asked for at once when the layer is asked for."""
        if self.on_demand:
            return sum(s.span.nbytes for s in self.slices)
        return sum(part.slice.span.nbytes for part in self.record_parts) if self.sparse else 0

    @property
    def neuron_bytes(self) -> int:
        """Of all records that are asked for one by one."""
        return self.records.count * self.records.width_bytes if self.sparse and self.records is not None else 0


@dataclass
class ModelLayout:
    """The whole model; `always` holds the refs of what stays, by (layer or -1, role)."""

    layers: list[LayerLayout]
    model: dict[str, MatrixLayout]
    embed: MatrixLayout
    head: MatrixLayout
    tied: bool
    embed_tensor: str
    always: dict[tuple[int, str], WeightRef]

    @property
    def body(self) -> list[Slice]:
        """Slices of everything before the head, in the order of the forward pass."""
        first = self.model["project_in"].slices if "project_in" in self.model else []
        last = self.model["project_out"].slices if "project_out" in self.model else []
        return [*first, *(s for layer in self.layers for s in layer.slices), *last]

    @property
    def on_demand(self) -> list[bool]:
        """Of each slice of `body`: is it asked for only when a token does not skip its block."""
        first = len(self.model["project_in"].parts) if "project_in" in self.model else 0
        last = len(self.model["project_out"].parts) if "project_out" in self.model else 0
        records = [{id(part.slice) for part in layer.record_parts} if layer.sparse else set() for layer in self.layers]
        inner = [
            layer.on_demand or id(one) in seldom
            for layer, seldom in zip(self.layers, records, strict=True)
            for one in layer.slices
        ]
        return [False] * first + inner + [False] * last


def lay_out(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightMap,
    sparse_layers: Collection[int] = (),
    degrade: bool = False,
) -> ModelLayout:
    """Cut a model into slices. Reads nothing. `sparse_layers` have predictors that say which neurons to read; with
    `degrade` small copies of experts are to be used. Raises UsageError where there are none."""
    tensors = checkpoint.tensors
    small: Mapping[int, RecordLayout] = getattr(checkpoint, "small", {}) if degrade else {}
    if degrade and not small:
        raise UsageError(
            "--degrade needs small copies of experts, and this model has none.",
            "Make a bundle with them: genai-run bundle MODEL OUT --small-experts int4.",
        )
    records: Mapping[int, RecordLayout] = getattr(checkpoint, "records", {})
    always: dict[tuple[int, str], WeightRef] = {}

    def stays(role: str) -> bool:
        biases = role.endswith(".bias") and not role.startswith("experts.")  # those of an expert come with it
        return biases or "norm" in role or role in ALWAYS

    model: dict[str, MatrixLayout] = {}
    for role, ref in weights.model.items():
        if stays(role):
            always[-1, role] = ref
        elif role not in ("embed", "head"):
            model[role] = _matrix(tensors, ref)
    embed = _matrix(tensors, weights.model["embed"])
    tied = weights.model["head"] == weights.model["embed"]
    head = embed if tied else _matrix(tensors, weights.model["head"])

    layers = []
    for index, roles in enumerate(weights.layers):
        layer = LayerLayout(on_demand=config.is_skippable(index), sparse=index in sparse_layers)
        for role, ref in roles.items():
            if stays(role):
                always[index, role] = ref
            elif not role.startswith("experts."):
                layer.matrices[role] = _matrix(tensors, ref)
        if index in records:
            _lay_out_records(layer, records[index], tensors)
        elif config.is_moe(index):
            _lay_out_experts(layer, roles, tensors, config)
        if index in small:
            extents, layouts = layer.expert_extents, layer.expert_layouts
            _lay_out_records(layer, small[index], tensors)
            layer.small_extents, layer.small_layouts = layer.expert_extents, layer.expert_layouts
            layer.expert_extents, layer.expert_layouts = extents, layouts
        layers.append(layer)
    return ModelLayout(layers, model, embed, head, tied, weights.model["embed"].tensor, always)


def _matrix(tensors: Mapping[str, TensorInfo], ref: WeightRef) -> MatrixLayout:
    info = tensors[ref.tensor]
    step = max(1, SLICE_BYTES // info.row_bytes)
    parts = []
    for start in range(0, ref.rows, step):
        rows = min(step, ref.rows - start)
        parts.append(RowSlice(Slice(info.rows(ref.row + start, rows)), start, rows))
    return MatrixLayout(parts, info.format, ref.rows, ref.cols)


def _lay_out_records(layer: LayerLayout, records: RecordLayout, tensors: Mapping[str, TensorInfo]) -> None:
    info = tensors[records.tensor]
    if records.kind == "neurons":
        layer.records_base = (info.path, info.offset)
        step = max(1, SLICE_BYTES // records.width_bytes)
        layer.records = records
        layer.record_parts = tuple(
            RowSlice(Slice(info.rows(start, rows)), start, rows)
            for start in range(0, records.count, step)
            for rows in (min(step, records.count - start),)
        )
        return
    part = {p.role: ExpertPart(0, p.offset, p.nbytes, p.rows, p.cols, p.format) for p in records.parts}
    layer.expert_extents = [(info.rows(e, 1),) for e in range(records.count)]
    layer.expert_layouts = [part] * records.count


def _lay_out_experts(
    layer: LayerLayout, roles: Mapping[str, WeightRef], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> None:
    assert config.moe is not None
    for expert in range(config.moe.num_experts):
        own = {name: roles[f"experts.{expert}.{name}"] for name in EXPERT if f"experts.{expert}.{name}" in roles}
        piece = {name: place for place, name in enumerate(own)}
        extents = {name: tensors[ref.tensor].rows(ref.row, ref.rows) for name, ref in own.items()}
        parts = {}
        for name, ref in own.items():
            if name.endswith(".scales"):
                continue
            rows, cols, fmt = ref.rows, ref.cols, tensors[ref.tensor].format
            if ref.turned:
                rows, cols = cols, rows
            scales = own.get(f"{name}.scales")
            if scales is not None:
                rows, cols, fmt = scales.rows, 32 * scales.cols, "MXFP4"
            apart = piece.get(f"{name}.scales")
            parts[name] = ExpertPart(piece[name], 0, extents[name].nbytes, rows, cols, fmt, ref.turned, apart)
        layer.expert_extents.append(tuple(extents.values()))
        layer.expert_layouts.append(parts)
