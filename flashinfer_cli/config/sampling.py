"""What is asked of sampling, and what holds where nothing is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class SamplingParams:
    """What the user asked of sampling; None means the model's generation_config, else the default named in
    `resolved`."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None  # None: the model's own
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(flag: str, value: float | None, low: float, high: float, what: str) -> None:
            if value is not None and not low <= value <= high:
                raise UsageError(f"{flag} is {value}; it must be {what}.")

        check("--max-tokens", self.max_tokens, 1, float("inf"), "at least 1")
        check("--temperature", self.temperature, 0, float("inf"), "0 (greedy) or more")
        check("--top-k", self.top_k, 0, float("inf"), "0 (off) or more")
        check("--top-p", self.top_p, 1e-9, 1, "above 0 and at most 1")
        check("--min-p", self.min_p, 0, 1, "between 0 and 1")
        check("--repeat-penalty", self.repeat_penalty, 1e-9, float("inf"), "above 0 (1 is off)")

    def resolved(self, generation_config: dict[str, Any] | None = None) -> SamplingParams:
        """Fill every None: flags win over generation_config, generation_config over the defaults (greedy,
        DEFAULT_MAX_TOKENS)."""
        given = generation_config or {}
        sampled = bool(given.get("do_sample", False))

        def pick(mine: Any, key: str, default: Any, *, only_sampled: bool = True) -> Any:
            if mine is not None:
                return mine
            value = given.get(key) if sampled or not only_sampled else None
            return default if value is None else value

        eos = given.get("eos_token_id")
        stops = self.stop_token_ids
        if stops is None:
            stops = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
        return replace(
            self,
            max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS,
            temperature=float(pick(self.temperature, "temperature", 1.0 if sampled else 0.0)),
            top_k=int(pick(self.top_k, "top_k", 0)),
            top_p=float(pick(self.top_p, "top_p", 1.0)),
            min_p=float(pick(self.min_p, "min_p", 0.0)),
            repeat_penalty=float(pick(self.repeat_penalty, "repetition_penalty", 1.0, only_sampled=False)),
            stop_token_ids=() if self.ignore_eos else stops,
        )
