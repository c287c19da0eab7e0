"""The small trained models that ship inside the package: their names, places and cards.

Each is a folder of this one, as `genai-run train` wrote it: a Hugging Face folder with its card beside it (README.md to
read, card.json for programs). The tuned one is a quantised bundle of what `genai-run tune` wrote. `zoo:NAME` names one
wherever a model is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFoundError, nearest

PREFIX = "zoo:"
DEFAULT = "stories-relu"  # what runs when no model is named
HOME = Path(__file__).resolve().parent
HELD_OUT = HOME / "held_out_stories.txt"  # stories that none of the models has seen, to calibrate and evaluate on


def names() -> list[str]:
    """The models that are here, the default first."""
    found = sorted(path.parent.name for path in HOME.glob("*/config.json"))
    return sorted(found, key=lambda name: name != DEFAULT)


def path_of(name: str) -> Path:
    """The folder of a model, with or without `zoo:`. Raises CheckpointNotFoundError naming the nearest."""
    plain = name.removeprefix(PREFIX)
    if plain not in names():
        near = nearest(plain, names())
        raise CheckpointNotFoundError(
            f"The zoo has no model '{plain}'.",
            (f"Did you mean '{PREFIX}{near}'? " if near else "") + "genai-run zoo lists them.",
        )
    return HOME / plain


def card(name: str) -> dict[str, Any]:
    """What is known of a model: data, recipe, losses, structure."""
    found: dict[str, Any] = json.loads((path_of(name) / "card.json").read_text(encoding="utf-8"))
    return found


def nbytes(name: str) -> int:
    """Of a model's weights."""
    return sum(file.stat().st_size for file in path_of(name).glob("*.safetensors"))
