"""`bundle`: repack a checkpoint for flash, with everything that a run needs beside the weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..bundles import BundlePlan, plan_bundle, write_bundle
from ..errors import TokenizerError, UsageError
from ..models.open import OpenModel, open_model

TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def open_source(model: str | Path, revision: str | None = None) -> OpenModel:
    """Open what is to be repacked. Raises UsageError for what is a bundle already."""
    opened = open_model(model, revision=revision)
    if opened.checkpoint.kind == "bundle":
        raise UsageError(f"{model} is a bundle already.")
    return opened


def dry_run(model: str | Path, *, dtype: str = "auto", revision: str | None = None) -> BundlePlan:
    """What `bundle` would write, from the source's headers alone."""
    opened = open_source(model, revision)
    return plan_bundle(opened.checkpoint, opened.config, opened.weights, dtype=dtype)


def bundle(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a bundle of `model` to the folder `out`, and return its path. Resumes what was cut off.

    `dtype` is of the neuron records: auto, f32, f16 or bf16. Raises BundleError where OUT is something else, or a run
    with other parameters was cut off there; StorageError when the disk is full.
    """
    opened = open_source(model, revision)
    with _extras(opened) as extras:
        return write_bundle(
            opened.checkpoint,
            opened.config,
            opened.weights,
            Path(out),
            dtype=dtype,
            extras=extras,
            progress=progress,
            overwrite=overwrite,
        )


@contextmanager
def _extras(opened: OpenModel) -> Iterator[dict[str, bytes | Path]]:
    """The small files beside the weights: copied from a folder, made from a GGUF's metadata."""
    checkpoint = opened.checkpoint
    extras: dict[str, bytes | Path] = {"config.json": _json(checkpoint.config)}
    if checkpoint.generation_config:
        extras["generation_config.json"] = _json(checkpoint.generation_config)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if checkpoint.kind != "gguf":
        extras |= {name: folder / name for name in TEXT_FILES if (folder / name).is_file() and name not in extras}
        yield extras
        return
    with tempfile.TemporaryDirectory() as made:
        try:
            opened.tokenizer.save(Path(made))
        except TokenizerError:
            yield extras
            return
        yield extras | {path.name: path for path in sorted(Path(made).iterdir())}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
