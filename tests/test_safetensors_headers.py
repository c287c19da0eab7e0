"""Every way a safetensors file can lie about itself, and that none gets further than opening."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_checkpoint_safetensors import entry, raw

from flashinfer_cli.checkpoint.open import open_checkpoint
from flashinfer_cli.checkpoint.safetensors_header import read_header
from flashinfer_cli.errors import (
    CorruptCheckpointError,
    GenaiRunError,
    UnsupportedModelError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


LIES: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b'{"a": ', b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "not UTF-8"),
    "nested": (b"[" * 100_000, b"", "not valid JSON"),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
    "a list": ([1], b"", "not a JSON object"),
    "name twice": (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8), "names 'a' twice"),
    "key twice": (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2]}}', bytes(8), "names 'dtype' twice"),
    "metadata": ({"__metadata__": 3}, b"", "__metadata__"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "'a' is not described"),
    "not an entry": ({"a": 7}, b"", "'a' is not described"),
    "unknown dtype": ({"a": entry(dtype="Q4_0")}, bytes(8), "'a' has the unknown dtype 'Q4_0'"),
    "dtype of another kind": ({"a": entry(dtype=5)}, bytes(8), "'a' has the unknown dtype '5'"),
    "dtype a list": ({"a": entry(dtype=["F32"])}, bytes(8), "'a' has the unknown dtype"),
    "negative offset": ({"a": entry(-8, 0)}, bytes(8), "'a' has data_offsets"),
    "fraction": ({"a": entry(0, 8.0)}, bytes(8), "'a' has data_offsets"),
    "flag": ({"a": entry(False, 8)}, bytes(8), "'a' has data_offsets"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(8), "'a' has data_offsets"),
    "backwards": ({"a": entry(8, 0)}, bytes(8), "'a' ends at 0, before"),
    "outside": ({"a": entry(0, 16, shape=(4,))}, bytes(8), "'a' ends at byte"),
    "far outside": ({"a": entry(1 << 62, (1 << 62) + 8)}, bytes(8), "'a' ends at byte"),
    "beyond 64 bits": ({"a": entry(1 << 70, (1 << 70) + 8)}, bytes(8), "'a' has data_offsets"),
    "shape smaller": ({"a": entry(shape=(1,))}, bytes(8), "'a' has 8 bytes, where F32 of shape [1] takes 4"),
    "shape larger": ({"a": entry(shape=(2, 1 << 62))}, bytes(8), "'a' has 8 bytes"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, bytes(8), "'a' has a shape"),
    "shape no list": ({"a": entry(shape="2")}, bytes(8), "'a' has a shape"),
    "names that would forge a screen": ({"\x1b[2J\n\ud800": entry(shape=(3,))}, bytes(8), r"'\x1b[2J\n\ud800' has 8"),
    "a very long name": ({"a" * 9000: entry(shape=(3,))}, bytes(8), "a" * 100 + "...' has 8"),
    "many dimensions": ({"a": entry(shape=(1,) * 1000)}, bytes(8), "'a' has a shape"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlaps"),
    "same place": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "overlaps"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "4 bytes before tensor 'b' belong to none"),
    "hole at the start": ({"a": entry(4, 12)}, bytes(12), "4 bytes before tensor 'a' belong to none"),
    "left over": ({"a": entry()}, bytes(9), "the last 1 bytes"),
    "cut off": ({"a": entry()}, bytes(7), "cut off"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(folder: Path, lie: str) -> None:
    header, data, says = LIES[lie]
    path = raw(folder / "model.safetensors", header, data)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(folder)
    assert says in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes, too few"),
        (b"1234567", "7 bytes, too few"),
        ((50).to_bytes(8, "little") + b"{}", "longer than the file"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "more than the format's 100 MB"),
    ],
)
def test_header_length(folder: Path, content: bytes, says: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=says):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U32", "F4"])
def test_foreign_formats_name_tensor_and_dtype(folder: Path, dtype: str) -> None:
    raw(folder / "model.safetensors", {"w.weight": entry(dtype=dtype, shape=(8,))}, bytes(8))
    with pytest.raises(UnsupportedModelError, match=rf"'w\.weight' has the number format {dtype}"):
        open_checkpoint(folder)


def test_damaged_bytes_never_escape_as_anything_else(tmp_path: Path) -> None:
    save_file({"a": np.ones((3, 4), np.float32), "bb": np.ones(5, np.float16)}, tmp_path / "good")
    good, rng = (tmp_path / "good").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(600):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad) - 58)] = rng.randrange(256)  # the last 58 bytes are values
        (tmp_path / "bad").write_bytes(bad[: rng.choice((len(bad), rng.randrange(len(bad))))])
        try:
            read_header(tmp_path / "bad")
        except GenaiRunError:
            refused += 1
    assert refused > 500
