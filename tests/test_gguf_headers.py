"""Headers of GGUF files that lie, are cut off or damaged: refused with a sentence, never anything else."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writing import arch_keys, write

from flashinfer_cli.checkpoint.gguf import GgufCheckpoint
from flashinfer_cli.checkpoint.gguf_header import read_gguf_header
from flashinfer_cli.checkpoint.open import open_checkpoint
from flashinfer_cli.errors import CorruptCheckpointError, GenaiRunError, UnsupportedModelError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def forge(path: Path, *, tensors: bytes = b"", count: int = 0, keys: bytes = b"", key_count: int = 0,
          version: int = 3, magic: bytes = b"GGUF", data: int = 0) -> Path:  # fmt: skip
    head = magic + struct.pack("<IQQ", version, count, key_count) + keys + tensors
    path.write_bytes(head + bytes(-len(head) % 32 + data))
    return path


def row(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 1 << 60
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"GGML"}, "does not start with 'GGUF'"),
    "tensor count": ({"count": HUGE}, "claims 1152921504606846976 tensors"),
    "key count": ({"key_count": HUGE}, "keys, more than can be"),
    "missing tensors": ({"count": 1}, "tensors, more than can be"),
    "key length": ({"key_count": 1, "keys": struct.pack("<Q", HUGE) + bytes(64)}, "bytes in a key"),
    "string length": ({"key_count": 1, "keys": text("k") + struct.pack("<IQ", 8, HUGE) + bytes(9)}, "bytes in 'k'"),
    "array length": ({"key_count": 1, "keys": text("k") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(9)}, "values in 'k'"),
    "strings": ({"key_count": 1, "keys": text("k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(9)}, "strings in 'k'"),
    "string in array": (
        {"key_count": 1, "keys": text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 20) + bytes(9)},
        "inside of 'k'",
    ),
    "long string in array": (
        {"key_count": 1, "keys": text("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE) + bytes(9)}, "claims a string of",
    ),
    "type": ({"key_count": 1, "keys": text("k") + struct.pack("<I", 77) + bytes(32)}, "unknown type 77"),
    "array in array": ({"key_count": 1, "keys": text("k") + struct.pack("<IIQ", 9, 9, 0) + bytes(32)}, "of type 9"),
    "key twice": ({"key_count": 2, "keys": (text("k") + struct.pack("<II", 4, 1)) * 2}, "the key 'k' twice"),
    "key not text": ({"key_count": 1, "keys": struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 1)}, "not UTF-8"),
    "alignment": (
        {"key_count": 1, "keys": text("general.alignment") + struct.pack("<II", 4, 24)}, "alignment 24, which is"
    ),
    "dimensions": ({"count": 1, "tensors": row(shape=(1,) * 5)}, "'t' has 5 dimensions"),
    "many dimensions": ({"count": 1, "tensors": text("t") + struct.pack("<I", 1 << 30) + bytes(64)}, "dimensions"),
    "overflow": ({"count": 1, "tensors": row(shape=(1 << 33, 1 << 33)), "data": 128}, "'t' has the shape"),
    "outside": ({"count": 1, "tensors": row(shape=(33,)), "data": 128}, "'t' ends at byte"),
    "offset outside": ({"count": 1, "tensors": row(offset=1 << 62), "data": 128}, "'t' ends at byte"),
    "not aligned": ({"count": 1, "tensors": row(offset=4), "data": 256}, "'t' begins at 4"),
    "overlap": ({"count": 2, "tensors": row() + row("u", offset=96), "data": 256}, "'u' overlaps"),
    "twice": ({"count": 2, "tensors": row() + row(offset=128), "data": 256}, "'t' is there twice"),
    "part of a block": ({"count": 1, "tensors": row(shape=(33,), kind=8), "data": 256}, "no multiple of the 32"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(tmp_path: Path, lie: str) -> None:
    parts, says = LIES[lie]
    path = forge(tmp_path / "m.gguf", **parts)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message


def test_versions_and_byte_order(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="version 1"):
        open_checkpoint(forge(tmp_path / "m.gguf", version=1))
    with pytest.raises(UnsupportedModelError, match="version 9"):
        open_checkpoint(forge(tmp_path / "m.gguf", version=9))
    big = write(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        open_checkpoint(big)
    good = bytearray(write(tmp_path / "m.gguf").read_bytes())
    good[4] = 2  # version 2 has the same layout
    (tmp_path / "m.gguf").write_bytes(good)
    assert open_checkpoint(tmp_path / "m.gguf").config["model_type"] == "llama"


@pytest.mark.parametrize(("kind", "name"), [(16, "IQ2_XXS"), (34, "TQ1_0"), (200, "ggml type 200")])
def test_unsupported_types_name_tensor_and_type(tmp_path: Path, kind: int, name: str) -> None:
    path = forge(tmp_path / "m.gguf", count=1, tensors=row("blk.0.x", (256,), kind), data=1024)
    with pytest.raises(UnsupportedModelError, match=rf"'blk\.0\.x' has the type {name}"):
        open_checkpoint(path)


def test_empty_and_cut_off(tmp_path: Path) -> None:
    good = write(tmp_path / "good.gguf", keys=arch_keys() | {"tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
    for size in range(0, len(good) - 1, 7):  # gguf pads the last tensor to the alignment: here its end is the file's
        (tmp_path / "cut.gguf").write_bytes(good[:size])
        with pytest.raises(CorruptCheckpointError):
            open_checkpoint(tmp_path / "cut.gguf")


def test_damaged_bytes_never_escape_as_anything_else(tmp_path: Path) -> None:
    keys = arch_keys(rope__scaling__type="yarn", rope__scaling__factor=2.0) | {"tokenizer.ggml.tokens": ["a", "b"]}
    path = write(tmp_path / "m.gguf", keys=keys, tensors={"token_embd.weight": np.zeros((2, 32), np.float32)})
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(800):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(len(bad) - 256)] = rng.choice((0, 1, 4, 6, 8, 9, 127, 255, rng.randrange(256)))
        path.write_bytes(bad)
        try:
            GgufCheckpoint(path)
        except GenaiRunError:
            refused += 1
    assert refused > 400


def test_opening_keeps_no_data(tmp_path: Path) -> None:
    """A sparse 64 GiB tensor opens by its header."""
    path = tmp_path / "m.gguf"
    forge(path, count=1, tensors=row(shape=(1 << 14, 1 << 20)))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 36))
    info = read_gguf_header(path).tensors["t"]
    assert (info.shape, info.nbytes) == ((1 << 20, 1 << 14), 1 << 36)
