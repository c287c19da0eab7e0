"""A config.json read key by key in our words, each checked: the family's own key first, then its default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CorruptCheckpointError
from .family import Family
from .rope_config import number

_MOST = {"num_hidden_layers": 10_000, "num_experts": 100_000}  # beyond these a file is damaged, not large


class ConfigReader:
    """Typed reads of a config by our words: the family's key, then its default."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family, self.config = family, config

    def get(self, word: str, *other_keys: str) -> Any:
        for key in (self.family.key(word), *other_keys):
            if key in self.config:
                return self.config[key]
        return self.family.defaults.get(self.family.key(word))

    def size(self, word: str, *other_keys: str, default: int | None = None) -> int:
        key = self.family.key(word)
        value = self.get(word, *other_keys)
        value = default if value is None else value
        if value is None:
            raise CorruptCheckpointError(f"The config lacks '{key}'.")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST.get(word, 2**31):
            raise CorruptCheckpointError(f"The config's '{key}' is {value!r}, which cannot be.")
        return value

    def flag(self, word: str, default: bool = False) -> bool:
        value = self.get(word)
        return default if value is None else bool(value)

    def optional(self, word: str) -> float | None:
        return None if self.get(word) is None else number({word: self.get(word)}, word, "file")

    def token_ids(self, word: str) -> tuple[int, ...]:
        value = self.get(word)
        ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise CorruptCheckpointError(f"The config's '{word}' is {value!r}, which is no token id.")
        return tuple(i for i in ids if i >= 0)
