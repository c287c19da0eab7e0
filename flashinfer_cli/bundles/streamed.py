"""What of a layer streams: neuron records, expert records and their small copies, or whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import ModelConfig, WeightRef
from ..errors import CorruptCheckpointError
from .choices import Choices, check_streamable, is_kept
from .convert import rounds
from .format import expert_layout, format_bytes, is_blocks, neuron_layout
from .layout import ExpertContent, NeuronContent, Rows
from .quantize import Quantize, format_of
from .roles import EXPERT, EXPERT_ROLE, FFN

MOST_PADDED = 1.06  # a quantised record may be so much longer for its alignment, or matrices are kept instead
_SPARSE = ("relu", "relu2")  # activations whose neurons are worth reading one by one

Streamed = NeuronContent | ExpertContent | dict[str, Rows]


def streamed(choices: Choices, config: ModelConfig, layer: int, roles: dict[str, WeightRef]) -> Streamed | None:
    """The layer's records, or its matrices where these stay; None where it has no FFN.

    Raises CorruptCheckpointError when its weights do not fit together, UnsupportedModelError on their format.
    """
    numbers = {int(match[1]) for role in roles if (match := EXPERT_ROLE.fullmatch(role))}
    if not numbers:
        dense = {role: choices.locate(roles[role]) for role in FFN if role in roles}
        return _neurons(choices, config, layer, dense) if dense else None
    count = config.moe.num_experts if config.moe is not None else len(numbers)
    if numbers != set(range(count)):
        raise CorruptCheckpointError(f"Layer {layer} has {len(numbers)} experts, not the {count} of the configuration.")
    experts: list[tuple[Rows, ...]] = []
    names = [part for part in EXPERT if f"experts.0.{part}" in roles]
    for expert in range(count):
        missing = [part for part in names if f"experts.{expert}.{part}" not in roles]
        if missing:
            raise CorruptCheckpointError(f"Expert {expert} of layer {layer} has no '{missing[0]}' matrix.")
        experts.append(tuple(_matrix(choices, roles, f"experts.{expert}.{part}") for part in names))
    return _experts(choices, layer, names, tuple(experts))


def _neurons(
    choices: Choices, config: ModelConfig, layer: int, sources: dict[str, Rows]
) -> NeuronContent | dict[str, Rows]:
    if "up" not in sources or "down" not in sources:
        raise CorruptCheckpointError(
            f"Layer {layer} has no {'down' if 'up' in sources else 'up'} projection in its FFN."
        )
    check_streamable(sources.values())
    up, down = sources["up"], sources["down"]
    for role in ("gate", "up"):
        if role in sources and sources[role].rows != down.info.cols:
            raise CorruptCheckpointError(
                f"'{sources[role].info.name}' has {sources[role].rows} neurons, "
                f"'{down.info.name}' has {down.info.cols}."
            )
    quantize = choices.quantization.experts
    formats = {rows.info.format for rows in sources.values()}
    sparse = config.hidden_act in _SPARSE
    target = choices.target
    if target is None and not sparse and any(is_kept(format, quantize) for format in formats):
        return sources
    if quantize != "none":
        target = format_of(quantize, up.info.cols)
        if target is None:
            what = f"Rows of {up.info.cols} elements are no multiple of 32"
            choices.note(f"{what}: neurons cannot become {quantize} and stay plain.")
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
    choices.exact = choices.exact and not any(rounds(format, target) for format in formats)
    return NeuronContent(layout, sources)


def _matrix(choices: Choices, roles: dict[str, WeightRef], role: str) -> Rows:
    rows, scales = choices.locate(roles[role]), roles.get(f"{role}.scales")
    return replace(rows, turned=roles[role].turned, scales=None if scales is None else choices.locate(scales))


def _experts(
    choices: Choices, layer: int, names: Sequence[str], experts: tuple[tuple[Rows, ...], ...]
) -> ExpertContent:
    parts = []
    for index, role in enumerate(names):
        column = [expert[index] for expert in experts]
        check_streamable(column)
        first = column[0]
        for rows in column[1:]:
            if (rows.shape, rows.format) != (first.shape, first.format):
                raise CorruptCheckpointError(
                    f"'{rows.info.name}' is {rows.format} {list(rows.shape)}, unlike "
                    f"'{first.info.name}' of another expert: {first.format} {list(first.shape)}."
                )
        quantize: Quantize = "none" if role.endswith(".bias") else choices.quantization.experts
        stored = choices.format(f"{role} of experts", first, quantize)
        if choices.target is not None and not is_blocks(stored):
            choices.exact = choices.exact and not rounds(stored, choices.target)
            stored = choices.target
        parts.append((role, *first.shape, stored))
    return ExpertContent(expert_layout(layer, len(experts), parts), experts)


def small_copies(choices: Choices, layer: int, content: ExpertContent) -> ExpertContent | None:
    """The layer's experts in fewer bits; None where that is not asked for or gives nothing."""
    quantize = choices.quantization.small
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
        choices.note(f"Experts of {content.layout.parts[0].format} become no smaller as {quantize}: no copies.")
        return None
    return ExpertContent(layout, content.experts)
