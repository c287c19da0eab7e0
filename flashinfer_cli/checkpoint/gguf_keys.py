"""Typed reads of GGUF metadata, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptCheckpointError, UnsupportedModelError
from .files import quoted


class Keys:
    """Typed reads of `metadata` below the architecture's own prefix."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, path: Path) -> None:
        self.metadata, self.arch, self.path = metadata, arch, path

    def get(self, key: str) -> Any:
        """A number, flag or text; None where the file is silent."""
        value = self.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, np.ndarray | list):
            raise self.wrong(key, value)
        return value

    def by_layer(self, key: str) -> np.ndarray | None:
        """An array, where the file has one."""
        value = self.metadata.get(f"{self.arch}.{key}")
        return value if isinstance(value, np.ndarray) and value.size else None

    def wrong(self, key: str, value: Any) -> CorruptCheckpointError:
        shown = (
            f"{len(value)} values"
            if isinstance(value, np.ndarray | list)
            else quoted(value)
            if isinstance(value, str)
            else repr(value)
        )
        return CorruptCheckpointError(f"{self.path} has '{self.arch}.{key}' = {shown}, which cannot be.")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0. Where a file gives one a layer, they must agree: our layers are all alike."""
        layers = self.by_layer(key)
        if layers is not None and (layers != layers[0]).any():
            raise UnsupportedModelError(
                f"{self.path} has '{self.arch}.{key}' differing from layer to layer, which is not supported."
            )
        value = self.get(key) if layers is None else layers[0].item()
        if value is None and default is not None:
            return default
        if value is None:
            raise CorruptCheckpointError(f"{self.path} lacks the key '{self.arch}.{key}'.")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise self.wrong(key, value)
        return value

    def real(self, key: str) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, value)
        return float(value)
