"""A GGUF model: one file or all parts of a split one, opened by reading headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedModelError
from .base import TensorInfo
from .files import quoted
from .gguf_config import make_config, make_generation_config
from .gguf_header import read_gguf_header

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_name(name: str) -> tuple[str, int, int] | None:
    """(stem, part from 1, number of parts) of `stem-00001-of-00003.gguf`; None for other names."""
    found = _SPLIT.fullmatch(name)
    return None if found is None else (found["stem"], int(found["part"]), int(found["count"]))


class GgufCheckpoint:
    """An opened GGUF model. Any part of a split model opens all of it.

    `metadata` has every key-value of the file: int, float, bool, str, list[str], numpy arrays for the rest. `config`
    and `generation_config` say the same in the words of a config.json, as far as running the model needs it.
    Raises CorruptCheckpointError and UnsupportedModelError naming the file and the tensor or key.
    """

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = _parts(path)
        headers = [read_gguf_header(part) for part in self._files]
        self.metadata: dict[str, Any] = headers[0].metadata
        tensors: dict[str, TensorInfo] = {}
        for header in headers:
            for name, info in header.tensors.items():
                if name in tensors:
                    raise CorruptCheckpointError(
                        f"Tensor {quoted(name)} is both in {tensors[name].path} and in {info.path}."
                    )
                tensors[name] = info
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._check_split()
        self._check_kind()
        self.config: dict[str, Any] = make_config(self.metadata, self.tensors, path)
        self.generation_config: dict[str, Any] = make_generation_config(self.metadata)

    @property
    def files(self) -> list[Path]:
        """The parts in their order."""
        return list(self._files)

    def _check_split(self) -> None:
        count = self.metadata.get("split.count", 0)
        if isinstance(count, int) and count > 1 and count != len(self._files):
            raise CorruptCheckpointError(
                f"{self.path} is one of {count} parts, and its name does not say which.",
                "Give the parts their original names: NAME-00001-of-00003.gguf and so on.",
            )
        total = self.metadata.get("split.tensors.count")
        if len(self._files) > 1 and isinstance(total, int) and total != len(self.tensors):
            raise CorruptCheckpointError(f"The parts of {self.path} hold {len(self.tensors)} of {total} tensors.")

    def _check_kind(self) -> None:
        kind = self.metadata.get("general.type", "model")
        if isinstance(kind, str) and kind != "model":
            raise UnsupportedModelError(f"{self.path} holds no language model: its general.type is {quoted(kind)}.")
        if not self.tensors:
            raise CorruptCheckpointError(f"{self.path} holds no tensors.")


def _parts(path: Path) -> list[Path]:
    split = split_name(path.name)
    if split is None:
        return [path]
    stem, part, count = split
    if not 1 <= part <= count:
        raise CorruptCheckpointError(f"{path} calls itself part {part} of {count}.")
    parts = [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for other in parts:
        if not other.is_file():
            raise CorruptCheckpointError(f"{path} is one of {count} parts, and '{other.name}' is missing.",
                                         "Put all parts into one folder.")  # fmt: skip
    return parts
