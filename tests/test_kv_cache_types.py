"""Keys and values kept as float16 or blocks of int8: the compiled code and its plain twin, and whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from half_code import halves_by
from tiny_models import DYNAMIC, Tiny, make, tiny_config_dicts

import flashinfer_cli as fc
from flashinfer_cli.cli.main import run
from flashinfer_cli.config import ModelConfig
from flashinfer_cli.engine import Engine
from flashinfer_cli.errors import UsageError
from flashinfer_cli.kernels import Kernels, lanes
from flashinfer_cli.kernels.kept import (
    elements,
    keep,
    kept_format,
    kept_format_of,
    to_floats,
)
from flashinfer_cli.kernels.native import NumbaKernels
from flashinfer_cli.kernels.program import Program
from flashinfer_cli.layers import attention

CONTEXT = 40
TYPES = ("f16", "q8_0")
IDS = [5, 9, 31, 7, 7, 50, 3, 90, 11, 64, 2, 17]


@pytest.mark.parametrize("native", [True, False])
def test_a_half_is_the_nearest_with_and_without_the_processors_help(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = halves_by(native, monkeypatch, lambda source, target: target.store_half(0, source.load(0, lanes.F32, 16)))
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    middles = (finite[1:] + finite[:-1]) / 2  # exact in float32; each rounds to the even neighbour
    given = np.concatenate(
        [halves, middles, np.nextafter(middles, np.float32(9e9)), np.nextafter(middles, -np.float32(9e9))]
    )
    given = np.concatenate([given, np.float32([65519.9, 65520, 1e6, 3e38, -3e38, 1e-40, -1e-40, 6e-8, 2.9e-8])])
    given = np.ascontiguousarray(np.pad(given, (0, -len(given) % 16)))
    got = np.empty(len(given), np.float16)
    for i in range(0, len(given), 16):
        convert(given.ctypes.data + 4 * i, got.ctypes.data + 2 * i)
    with np.errstate(over="ignore"):
        want = given.astype(np.float16)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint16)[numbers], want.view(np.uint16)[numbers])
    assert np.isnan(got[~numbers]).all()


def test_blocks_are_those_of_gguf() -> None:
    x = torch.randn(5, 3, 96) * torch.tensor([1e-7, 1e-3, 1.0, 50.0, 1e6])[:, None, None]
    x[1, 1] = 0
    kept = keep(x, "Q8_0")
    assert kept.shape == (5, 3, 102) and kept_format(kept) == "Q8_0" and elements(kept) == 96
    decoded = torch.from_numpy(dequantize(kept.numpy(), GGMLQuantizationType.Q8_0))
    assert torch.equal(to_floats(kept), decoded)
    ours, theirs = (
        (found - x).abs().amax(-1) for found in (decoded, torch.from_numpy(dequantize(
            gguf_quantize(x.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)))
    )  # fmt: skip
    held = x.abs().amax(-1) < 1e5  # scales up to 65504
    assert (ours[held] <= 1.01 * theirs[held] + 1e-9).all()


def test_what_is_too_large_is_kept_as_the_largest_and_nan_stays() -> None:
    x = torch.tensor([1e30, -1e30, float("inf"), float("nan"), *[1.0] * 28])
    half = to_floats(keep(x, "F16"))
    assert half[:3].tolist() == [65504.0, -65504.0, 65504.0] and half[3].isnan() and half[4] == 1.0
    assert to_floats(keep(x, "Q8_0")).isnan().all()
    assert to_floats(keep(torch.full((32,), -1e30), "Q8_0")).tolist() == [-65504.0 * 127] * 32


@pytest.mark.parametrize("fmt", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize(("turned", "interleaved"), [(0, False), (64, False), (40, True)])
def test_a_program_keeps_the_bits_that_calls_keep(
    numba: NumbaKernels, fmt: str, turned: int, interleaved: bool
) -> None:
    heads, kv_heads, hd, held = 4, 3, 64, np.array([5], np.int64)
    q, k, v = torch.randn(heads, hd), torch.randn(kv_heads, hd) * 7, torch.randn(kv_heads, hd)
    v[0], v[1, :32], k[2] = 0, 1e9, k[2] * 1e-6
    cos, sin = torch.randn(2, max(turned // 2, 1))
    keys, values = (keep(torch.zeros(kv_heads, 9, hd), fmt).clone() for _ in range(2))
    program, given = Program(numba.threads), k.clone()
    program.rotate(q, given, v, keys, values, (cos, sin) if turned else None, interleaved, held)
    numba.run(program)
    if turned:
        half = turned // 2
        one, other = (k[:, 0:turned:2], k[:, 1:turned:2]) if interleaved else (k[:, :half], k[:, half:turned])
        a, b = one * cos - other * sin, other * cos + one * sin
        k = torch.cat((torch.stack((a, b), -1).flatten(1) if interleaved else torch.cat((a, b), 1), k[:, turned:]), 1)
        assert torch.allclose(given, k, rtol=1e-5, atol=1e-9)  # multiply-adds may be rounded once
    assert torch.equal(keys[:, 5], keep(given, fmt)) and torch.equal(values[:, 5], keep(v, fmt))
    empty = keep(torch.zeros(kv_heads, hd), fmt)
    assert all(torch.equal(kept[:, place], empty) for kept in (keys, values) for place in (4, 6))


@pytest.mark.parametrize("fmt", ["F16", "Q8_0"])
@pytest.mark.parametrize("hd", [32, 96])
def test_attention_over_what_is_kept_is_that_of_its_float_values(kernels: Kernels, fmt: str, hd: int) -> None:
    for length in (1, 3, 4, 17, 130):
        cache = keep(torch.randn(2, 2, length + 3, hd), fmt)
        keys, values = cache[:, :, :length]
        for group in (1, 5):
            q = torch.randn(2 * group, hd) * 3
            for window in (None, 9):
                out = torch.empty_like(q)
                kernels.attend(q, keys, values, 0.3, window, out)
                low = max(0, length - window) if window else 0
                k, v = (to_floats(each[:, low:]).double().repeat_interleave(group, 0) for each in (keys, values))
                scores = (k @ q.double()[:, :, None])[..., 0] * 0.3
                want = (scores.softmax(-1)[:, None] @ v)[:, 0]
                assert (out - want).abs().max() < 2e-5, (length, group, window)


@pytest.mark.parametrize("fmt", ["F16", "Q8_0"])
def test_a_prompt_sees_the_float_values_of_some_heads_at_a_time(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv = torch.randn(6, 7, 32), keep(torch.randn(2, 3, 21, 32), fmt)
    options = {"scale": 0.2, "window": 9, "softcap": 5.0, "sinks": torch.randn(6)}
    want = attention.attend(q, *(to_floats(each) for each in kv), **options)
    assert torch.allclose(attention.attend(q, *kv, **options), want, atol=1e-6)
    for heads in (1, 2):
        seen = 7 + 9 - 1
        monkeypatch.setattr(attention, "FLOAT_BYTES", 4 * seen * 64 * heads)
        made: list[tuple[int, ...]] = []
        monkeypatch.setattr(
            attention, "to_floats", lambda kept, made=made: (made.append(kept.shape), to_floats(kept))[1]
        )
        assert torch.allclose(attention.attend(q, *kv, **options), want, atol=1e-6)
        assert [shape[:2] for shape in made[::2]] == ([(1, seen)] * 3 if heads == 1 else [(2, seen), (1, seen)])


# ---- models


def _off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of the family with heads of 32, for blocks."""
    root = tmp_path_factory.mktemp("wide")
    return cache(lambda family: make(family, 0, root / family, head_dim=32)[0])


def _steps(engine: Engine, plain: bool = False) -> torch.Tensor:
    if plain:
        engine.decoder.blocks = tuple(replace(block, one=None) for block in engine.decoder.blocks)
    session = engine.session()
    session.prefill(IDS[:4], more=True)
    out = [session.step(token, more=True).clone() for token in IDS[4:7]]
    out += list(session.verify(IDS[7:9], more=True))
    session.trim(8)
    return torch.stack(out + [session.step(token, more=True).clone() for token in IDS[8:]])


@pytest.mark.parametrize("kept", TYPES)
@pytest.mark.parametrize("family", ["arcee", "qwen3", "gemma3_text", "qwen3_moe"])
def test_one_tokens_program_and_calls_agree_and_are_close_to_float32(
    wide: Callable[[str], Path], family: str, kept: str
) -> None:
    folder, found = wide(family), []
    for kind, plain in (("f32", False), (kept, False), (kept, True)):
        with fc.load(folder, kv_cache_type=kind, context=CONTEXT, kernels="compiled", threads=2) as engine:
            found.append(_steps(engine, plain))
            assert engine.exactness == ("quantized" if kind == "q8_0" else "exact")
    exact, program, calls = found
    assert torch.equal(program, calls)
    assert 0 < _off(program, exact) < (2e-3 if kept == "f16" else 3e-2)
    assert torch.equal(program[4], program[5])  # a token checked behind another, and by itself


@pytest.mark.parametrize(
    ("family", "index"), [("qwen2", 0), ("gemma2", 0), ("gpt_oss", 0), ("deepseek_v2", 0), ("opt", 0)]
)
def test_every_kind_of_attention_runs_on_halves(tiny: Tiny, family: str, index: int) -> None:
    folder, _ = tiny(family, index)
    found = []
    for kind in ("f32", "f16"):
        with fc.load(folder, kv_cache_type=kind, context=CONTEXT) as engine:
            assert engine._kv.format == kind.upper()
            found.append(engine.logits(IDS))
    assert 0 < _off(found[1], found[0]) < 3e-3


def test_rotations_that_change_with_the_length_turn_what_was_kept(tiny: Tiny) -> None:
    index = next(i for i, case in enumerate(tiny_config_dicts()["llama"]) if DYNAMIC.items() <= case.items())
    (folder, _), found = tiny("llama", index), []
    for kind in ("f32", *TYPES):
        with fc.load(folder, kv_cache_type=kind, context=CONTEXT) as engine:
            found.append(engine.logits(IDS))
    for other, most in zip(found[1:], (3e-3, 5e-2), strict=True):
        assert 0 < _off(other, found[0]) < most


def test_auto_keeps_halves_but_for_weights_of_float32(tiny: Tiny, tmp_path: Path) -> None:
    folder, model = tiny("arcee", 0)
    with fc.load(folder, context=CONTEXT) as engine:
        assert engine.run.kv_cache_type == "f32" and engine._kv.format == "F32"
    copy.deepcopy(model).half().save_pretrained(tmp_path)
    with fc.load(tmp_path, context=CONTEXT) as engine:
        assert engine.run.kv_cache_type == "f16" and engine.new_cache(3).format == "F16"
        assert "40 tokens, f16" in [part.note for part in engine.report().plan]
        assert engine.model.kv_bytes_per_token * CONTEXT == engine._kv.nbytes


def test_the_plan_counts_what_is_kept(wide: Callable[[str], Path]) -> None:
    folder = wide("arcee")
    planned, scratch = {}, {}
    for kind in ("f32", *TYPES):
        with fc.load(folder, kv_cache_type=kind, context=CONTEXT) as engine:
            part = next(part for part in engine.report().plan if part.part == "keys and values")
            assert part.planned == part.actual
            planned[kind] = part.planned
            scratch[kind] = next(part.planned for part in engine.report().plan if part.part == "scratch")
            heads, *widths = engine.config.kv_shape
    assert scratch["f16"] - scratch["f32"] == scratch["q8_0"] - scratch["f32"] == 4 * CONTEXT * heads * sum(widths)
    assert planned["f16"] * 2 == planned["f32"] and planned["q8_0"] * 128 == planned["f32"] * 34


def test_heads_that_are_no_blocks_are_told_of(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = tiny("arcee", 0)
    with pytest.raises(UsageError, match="blocks of 32 elements"):
        fc.load(folder, kv_cache_type="q8_0")
    assert run(["plan", "--model", str(folder), "--kv-cache-type", "q8_0"]) == 2
    assert "Take f16" in capsys.readouterr().err
    with pytest.raises(UsageError, match="none of auto, f32, f16, q8_0"):
        fc.load(folder, kv_cache_type="q4_0")


def test_what_a_recurrent_model_carries_on_is_never_rounded() -> None:
    sizes = {
        "vocab_size": 9, "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 20, "intermediate_size": 4,
    }  # fmt: skip
    words = {"model_type": "lstm", "max_position_embeddings": 0, "hidden_act": "relu"}
    assert kept_format_of(ModelConfig(**sizes, **words, recurrent=True), "q8_0") == "F32"  # type: ignore[arg-type]
    assert kept_format_of(ModelConfig(**sizes, **words), "f16") == "F16"  # type: ignore[arg-type]
