"""Run language models larger than memory: the weights stay on the SSD, and only what the next token needs is brought
in.

    import flashinfer_cli as fc
    with fc.load("path/to/model", memory="2GiB") as engine:
        for event in engine.generate("Once upon a time"):
            print(event.text, end="")

Importing the package imports neither torch nor numba: the names below are fetched when first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apps.bundling import bundle
    from .config import ModelConfig, RunConfig, SamplingParams
    from .decoding.generate import TokenEvent
    from .engine import Engine
    from .loading import load
    from .report import RunReport

try:
    __version__ = version("genai-run")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"

_HOMES = {
    "load": "loading", "bundle": "apps.bundling", "Engine": "engine", "TokenEvent": "decoding.generate", "RunReport":
    "report", "ModelConfig": "config", "RunConfig": "config", "SamplingParams": "config",
}  # fmt: skip
__all__ = ["Engine", "ModelConfig", "RunConfig", "RunReport", "SamplingParams", "TokenEvent", "bundle", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
