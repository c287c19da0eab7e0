"""A checkpoint's tensors, and which of them have been given a role: a shape is checked as a tensor is taken, and one
that nobody took is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..checkpoint.base import TensorInfo
from ..config import WeightRef
from ..errors import CorruptCheckpointError, UnsupportedModelError

Refs = dict[str, WeightRef]

# Buffers that older files carry, tables that follow from the config, and what belongs to other senses than text.
_HARMLESS = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|attention\.bias)$"
    r"|(.*\.)?(rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd)\.weight$"
    r"|(model\.)?(vision_tower|vision_model|multi_modal_projector|visual)\."
)
_WEIGHTLESS = ("I8", "U8", "I16", "I32", "I64", "BOOL", "F64")


def missing(names: tuple[str, ...], suffix: str = ".weight") -> CorruptCheckpointError:
    """The error for a weight none of whose names is there."""
    others = f" (nor '{names[1]}{suffix}')" if len(names) > 1 else ""
    return CorruptCheckpointError(f"The checkpoint lacks the tensor '{names[0]}{suffix}'{others}.")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


class TensorTable:
    """The tensors, and which of them have been given a role."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()

    def find(self, names: tuple[str, ...], suffix: str = ".weight") -> TensorInfo | None:
        """The first of the alternatives that is there. Fused experts have no suffix in safetensors."""
        for name in names:
            found = self.tensors.get(name + suffix) or (self.tensors.get(name) if suffix == ".weight" else None)
            if found is not None:
                return found
        return None

    def take(self, info: TensorInfo, shape: tuple[int, ...], fmt: str | None = None) -> WeightRef:
        """The whole tensor as a matrix, after a check of its shape (dimensions of one do not count). `fmt` is what it
        must be where it is no weight by itself."""
        if _squeezed(info.shape) != _squeezed(shape):
            raise CorruptCheckpointError(
                f"Tensor '{info.name}' has shape {list(info.shape)}, where the config asks for {list(shape)}."
            )
        if info.format != fmt if fmt is not None else info.format in _WEIGHTLESS:
            raise UnsupportedModelError(f"Tensor '{info.name}' has the format {info.format}, which no weight may have.")
        self.used.add(info.name)
        rows = 1
        for size in shape[:-1]:
            rows *= size
        return WeightRef(info.name, 0, rows, shape[-1])

    def need(self, names: tuple[str, ...], shape: tuple[int, ...]) -> WeightRef:
        info = self.find(names)
        if info is None:
            raise missing(names)
        return self.take(info, shape)

    def add(self, refs: Refs, role: str, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Role and, where the tensor exists, its bias."""
        refs[role] = self.need(names, shape)
        bias = self.find(names, ".bias")
        if bias is not None:
            refs[f"{role}.bias"] = self.take(bias, shape[:1] if len(shape) > 1 else shape)

    def check_all_used(self) -> None:
        left = [name for name in self.tensors if name not in self.used and not _HARMLESS.match(name)]
        if left:
            more = "" if len(left) == 1 else f" and {len(left) - 1} more"
            raise UnsupportedModelError(
                f"The checkpoint has the tensor '{left[0]}'{more} with no place in this architecture.",
                "Running without it would give wrong text in silence.",
            )
