"""`bundle`: repack a checkpoint for flash, with everything that a run needs beside the weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..bundles import BundlePlan, chosen, plan_bundle, write_bundle
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


def dry_run(
    model: str | Path,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    quantize_experts: str | None = None,
    quantize_trunk: str | None = None,
    rounding: str = "search",
    small_experts: str | None = None,
    revision: str | None = None,
) -> BundlePlan:
    """What `bundle` would write, from the source's headers alone."""
    quantization = chosen(quantize, quantize_experts, quantize_trunk, rounding, small_experts)
    opened = open_source(model, revision)
    return plan_bundle(opened.checkpoint, opened.config, opened.weights, dtype=dtype, quantization=quantization)


def bundle(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    quantize_experts: str | None = None,
    quantize_trunk: str | None = None,
    rounding: str = "search",
    small_experts: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    notify: Callable[[str], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a bundle of `model` to the folder `out`, and return its path. Resumes what was cut off.

    `dtype` is of the streamed weights that stay plain: auto, f32, f16 or bf16. `quantize` (none, int8, int4) rounds the
    weights, to what `quantize_experts` says those that stream and to what `quantize_trunk` says the others, where these
    are given; int4 alone leaves the trunk at int8. `rounding` is `search` or `nearest`.
    `small_experts` (int8, int4) adds a second, smaller copy of every expert, for `degrade`. `notify` gets a sentence
    where something asked for cannot be done. Raises UsageError for words that there are not or that contradict each
    other, BundleError where OUT is something else, or a run with other parameters was cut off there; StorageError when
    the disk is full.
    """
    quantization = chosen(quantize, quantize_experts, quantize_trunk, rounding, small_experts)
    opened = open_source(model, revision)
    if notify is not None:
        planned = plan_bundle(opened.checkpoint, opened.config, opened.weights, dtype=dtype, quantization=quantization)
        for note in planned.notes:
            notify(note)
    with _extras(opened) as extras:
        return write_bundle(
            opened.checkpoint,
            opened.config,
            opened.weights,
            Path(out),
            dtype=dtype,
            quantization=quantization,
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
