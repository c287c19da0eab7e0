"""Quantised bundles: what rounding loses, and that what runs is what was written."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_weights import OURS
from tiny_models import Tiny, make

import flashinfer_cli as fc
from flashinfer_cli.bundles import chosen, open_bundle
from flashinfer_cli.bundles.quantize import QUANTIZE, SYMMETRIC, format_of, quantize
from flashinfer_cli.errors import UnsupportedModelError, UsageError
from flashinfer_cli.kernels.reference import to_float

FORMATS = ("Q8_0", "Q8_G128", "Q4_1", "Q4_G64")
GROUP = {"Q8_0": 32, "Q8_G128": 128, "Q4_1": 32, "Q4_G64": 64}
IDS = [1, 5, 9, 33, 77, 20, 4, 4, 90, 15]


def restored(blocks: np.ndarray, format: str) -> np.ndarray:
    if format in OURS:  # `to_float` is held against its definition by the tests of the kernels
        return to_float(torch.from_numpy(blocks), format).numpy()
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format])


def group_loss(values: np.ndarray, format: str, rounding: str) -> np.ndarray:
    error = restored(quantize(values, format, rounding), format) - values
    return np.square(error, dtype=np.float64).reshape(-1, GROUP[format]).sum(1)


def weights(kind: str, rows: int = 64, cols: int = 512) -> np.ndarray:
    generator = np.random.default_rng(11)
    if kind == "normal":
        return generator.standard_normal((rows, cols)).astype(np.float32) * 0.02
    return generator.standard_t(3, (rows, cols)).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_a_search_loses_less_than_nearest_in_every_group(format: str, kind: str) -> None:
    values = weights(kind)
    nearest, searched = group_loss(values, format, "nearest"), group_loss(values, format, "search")
    assert (searched <= nearest * (1 + 1e-6)).all()
    assert searched.sum() < (0.985 if format in SYMMETRIC else 0.9) * nearest.sum()


@pytest.mark.parametrize("format", ["Q8_0", "Q4_1"])
def test_nearest_is_as_good_as_ggufs_own(format: str) -> None:
    values = weights("normal")
    kind = gguf.GGMLQuantizationType[format]
    theirs = np.square(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind) - values).sum()
    assert group_loss(values, format, "nearest").sum() == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "search"])
def test_what_blocks_can_hold_comes_back(format: str, rounding: str) -> None:
    low, high = (-127, 127) if format in SYMMETRIC else (0, 15)
    levels = np.random.default_rng(2).integers(low, high + 1, (6, 256))
    levels.reshape(-1, 32)[:, :2] = low, high
    values = levels.astype(np.float32) * 0.125 - (0 if format in SYMMETRIC else 1.5)
    values[4], values[5] = 0, -0.75  # all of a group alike
    got = restored(quantize(values, format, rounding), format)
    assert np.allclose(got, values, rtol=1e-3 if format in SYMMETRIC else 0, atol=0)


@pytest.mark.parametrize("format", SYMMETRIC)
def test_nearest_is_off_by_half_a_step_at_most(format: str) -> None:
    values = weights("heavy tails")
    groups = values.reshape(-1, GROUP[format])
    error = np.abs(restored(quantize(values, format, "nearest"), format).reshape(groups.shape) - groups).max(1)
    step = np.abs(groups).max(1) / 127
    assert (error <= step * (0.5 + 127 * 2**-11)).all()  # and what the scale loses as a float16, at the largest
    assert error.mean() > 0.4 * step.mean()


@pytest.mark.parametrize("format", FORMATS)
def test_a_group_is_rounded_by_itself(format: str) -> None:
    values = weights("heavy tails", 40, 256)
    whole = quantize(values, format, "search")
    assert np.array_equal(quantize(values[7:9], format, "search"), whole[7:9])


def test_weights_past_the_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        quantize(np.full((1, 128), 1e8, np.float32) * np.arange(128, dtype=np.float32), "Q8_0", "nearest")
    folder, _ = make("llama", 0, tmp_path / "m")
    held = load_file(folder / "model.safetensors")
    name = next(each for each in held if "q_proj.weight" in each)
    held[name][3, 4] = 1e9
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="q_proj"):
        fc.bundle(folder, tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()


def rounded_folder(folder: Path, out: Path, streamed: str, trunk: str, records: bool) -> Path:
    """The same checkpoint with every weight as it is after rounding, plain."""
    held = load_file(folder / "model.safetensors")

    def through(values: torch.Tensor, level: str) -> torch.Tensor:
        format = format_of(level, values.shape[1])
        if format is None:
            return values
        return torch.from_numpy(restored(quantize(values.numpy(), format, "search"), format)).clone()

    for name, values in held.items():
        if values.dim() != 2 or "mlp.gate.weight" in name:
            continue
        if "experts" in name:
            held[name] = through(values, streamed)
        elif "down_proj" in name and records:  # a neuron's column lies beside its rows
            held[name] = through(values.T.contiguous(), streamed).T.contiguous()
        elif "mlp" in name:
            held[name] = through(values, streamed)
        else:
            held[name] = through(values, trunk)
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(("family", "index"), [("llama", 0), ("llama", 2), ("llama", 3), ("olmoe", 0)])
@pytest.mark.parametrize(("level", "trunk"), [("int8", "none"), ("int4", "int8"), ("int4", "int4")])
def test_a_bundle_computes_what_it_holds(
    family: str, index: int, level: str, trunk: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder, _ = tiny(family, index)
    made = fc.bundle(folder, tmp_path / "out", quantize_experts=level, quantize_trunk=trunk)
    bundle = open_bundle(made)
    assert bundle.manifest.exactness == "quantized"
    whole = ("llama", 0), ("llama", 3)  # half of so short a record would be padding
    assert bool(bundle.records) == ((family, index) not in whole)
    plain = rounded_folder(folder, tmp_path / "plain", level, trunk, bool(bundle.records))
    with fc.load(plain, context=16, kv_cache_type="f32", stream="never") as engine:
        expected = engine.logits(IDS)
    with fc.load(folder, context=16, kv_cache_type="f32", stream="never") as engine:
        assert (engine.logits(IDS) - expected).abs().max() > 1e-3  # or nothing was rounded
    found = []
    for stream in ("never", "always"):
        with fc.load(made, context=16, kv_cache_type="f32", stream=stream) as engine:
            found.append(engine.logits(IDS))
            assert engine.report().exactness == "quantized"
    assert torch.equal(found[0], found[1])
    assert (found[0] - expected).abs().max() < 2e-3


def test_int8_is_in_groups_of_128_where_columns_allow_it(tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = tiny("llama", 3)
    bundle = open_bundle(fc.bundle(folder, tmp_path / "out", quantize="int8"))
    found = {role: bundle.tensors[bundle.weights.layers[0][role].tensor] for role in ("q", "o", "gate", "down")}
    assert {role: (info.cols, info.format) for role, info in found.items()} == {
        "q": (64, "Q8_0"), "o": (128, "Q8_G128"), "gate": (64, "Q8_0"), "down": (96, "Q8_0"),
    }  # fmt: skip
    assert found["o"].nbytes == found["o"].num_rows * 130
    assert (format_of("int8", 256), format_of("int8", 192), format_of("int8", 48)) == ("Q8_G128", "Q8_0", None)


def test_int4_leaves_the_trunk_at_int8_and_small_tensors_alone(tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = tiny("olmoe", 0)
    bundle = open_bundle(fc.bundle(folder, tmp_path / "out", quantize="int4"))
    formats = {role: bundle.tensors[ref.tensor].format for role, ref in bundle.weights.layers[0].items()}
    assert {formats[role] for role in ("q", "k", "v", "o")} == {"Q8_0"}
    assert formats["router"] == formats["attn_norm"] == "F32"
    assert {part.format for part in bundle.records[0].parts} == {"Q4_1"}  # 64 columns are no multiple of 128
    assert bundle.tensors[bundle.weights.model["embed"].tensor].format == "Q8_0"
    smaller = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert smaller < 0.5 * (folder / "model.safetensors").stat().st_size


def test_words_that_there_are_not() -> None:
    for bad in ({"quantize": "int3"}, {"experts": "fp8"}, {"trunk": "x"}, {"rounding": "up"}):
        with pytest.raises(UsageError, match="none of"):
            chosen(**bad)
    assert [chosen(level).trunk for level in QUANTIZE] == ["none", "int8", "int8"]
    assert (chosen("int4", trunk="none").trunk, chosen(experts="int8").trunk) == ("none", "none")
