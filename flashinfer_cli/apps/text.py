"""The text that a model is calibrated on, as ids that the model knows."""

from __future__ import annotations

from ..errors import TokenizerError, UsageError
from ..models.open import OpenModel


def ids_of(opened: OpenModel, text: str, least: int) -> list[int]:
    """All ids of the text. Raises UsageError where they are fewer than `least`, TokenizerError where the tokenizer is
    another model's."""
    ids = opened.tokenizer.encode(text)
    if len(ids) < least:
        raise UsageError(
            f"The text is {len(ids):,} tokens; calibration needs {least:,} at least.", "Give a longer text with --text."
        )
    if max(ids) >= opened.config.vocab_size:
        raise TokenizerError(
            f"The tokenizer of {opened.name} makes ids up to {max(ids):,}, and the model knows "
            f"{opened.config.vocab_size:,}: it is another model's.",
            "Make the bundle again from the whole folder of the model.",
        )
    return ids
