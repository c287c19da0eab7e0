"""Which weight goes to which byte of which file: the bundle laid out from the checkpoint's headers, nothing read."""

from __future__ import annotations

from ..checkpoint.base import Checkpoint
from ..config import ModelConfig, WeightMap, WeightRef
from ..errors import BundleError, CorruptCheckpointError, UsageError
from .choices import Choices
from .format import MATRICES, RecordLayout, safetensors_header
from .layout import BundlePlan, ExpertContent, NeuronContent, PlannedFile
from .matrices import MatrixFile, trunk_file
from .quantize import Quantization
from .streamed import small_copies, streamed

DTYPES = ("auto", "f32", "f16", "bf16")


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
    choices = Choices(checkpoint.tensors, None if dtype.lower() == "auto" else dtype.upper(), quantization)
    files: list[PlannedFile] = []
    records: dict[int, RecordLayout] = {}
    small: dict[int, RecordLayout] = {}
    kept: list[dict[str, WeightRef]] = []  # by layer: where matrices that stream stand
    for layer, roles in enumerate(weights.layers):
        content, matrices = streamed(choices, config, layer, roles), {}
        if isinstance(content, dict):
            own = MatrixFile(choices)
            matrices = {role: own.place(role, roles[role], quantization.experts) for role in content}
            files.append(own.file(f"{MATRICES}{layer:03}.safetensors"))
        elif content is not None:
            records[layer] = content.layout
            files.append(_record_file(choices, content))
            copies = small_copies(choices, layer, content) if isinstance(content, ExpertContent) else None
            if copies is not None:
                small[layer] = copies.layout
                files.append(_record_file(choices, copies))
        kept.append(matrices)
    trunk, placed = trunk_file(choices, weights)
    return BundlePlan(
        {"dtype": dtype.lower(), **quantization.parameters},
        "exact" if choices.exact else "quantized",
        (trunk, *files),
        WeightMap(placed.model, tuple(stays | own for stays, own in zip(placed.layers, kept, strict=True))),
        choices.formats,
        records,
        small,
        tuple(choices.notes),
    )


def _record_file(choices: Choices, content: NeuronContent | ExpertContent) -> PlannedFile:
    layout = content.layout
    header = safetensors_header([(layout.tensor, layout.format, layout.shape)])
    size = len(header) + layout.count * layout.width_bytes
    return PlannedFile(layout.file, size, header, content, choices.quantization.rounding)
