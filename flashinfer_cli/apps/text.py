"""The text that a model is calibrated on: from a file, and as ids that the model knows."""

from __future__ import annotations

from pathlib import Path

from ..errors import TokenizerError, UsageError
from ..models.open import OpenModel


def read_text(path: Path) -> str:
    """The calibration text. Raises UsageError for a file that is missing or no text."""
    try:
        return path.read_text(encoding="utf-8").replace("<|endoftext|>", "\n")
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.", "--text takes a text file.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte {error.start:,} is 0x{error.object[error.start]:02x}.",
            "Convert it, say with iconv -f LATIN1 -t UTF-8, or give another.",
        ) from None


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
