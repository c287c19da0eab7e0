"""What one token needs beside products, and blocks written down as programs: the same bits as call by call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import Tiny

import flashinfer_cli as fc
from flashinfer_cli.engine import Engine
from flashinfer_cli.kernels import Kernels
from flashinfer_cli.kernels.native import NumbaKernels
from flashinfer_cli.kernels.program import Program
from flashinfer_cli.layers.rope import Rope

CONTEXT = 40


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 16), (2, 5, 33), (70, 2048)])
def test_norm_is_that_of_float64(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for factors in (None, weight):
        out = torch.empty(shape)
        kernels.norm(x, factors, 1e-5, out)
        want = exact if factors is None else exact * factors
        assert (out - want).abs().max() < 1e-5 * max(1, want.abs().max())
    whole, row = torch.empty(shape), torch.empty(shape[-1:])
    kernels.norm(x, weight, 1e-5, whole)
    kernels.norm(x.reshape(-1, shape[-1])[-1].clone(), weight, 1e-5, row)
    assert kernels.name != "numba" or torch.equal(whole.reshape(-1, shape[-1])[-1], row)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 33), (70, 2048)])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_is_that_of_float64(kernels: Kernels, shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = torch.randn(shape) * 3 + 20, torch.randn(shape[-1]), torch.randn(shape[-1])
    x[0] = 7.0  # of which nothing is left but the bias
    parts = (weight, bias) if biased else (None, None)
    out = torch.empty(shape)
    kernels.layer_norm(x, *parts, 1e-5, out)
    exact = torch.nn.functional.layer_norm(
        x.double(), shape[-1:], *(None if p is None else p.double() for p in parts), 1e-5
    )
    assert (out - exact).abs().max() < 1e-4
    row = torch.empty(shape[-1:])
    kernels.layer_norm(x.reshape(-1, shape[-1])[-1].clone(), *parts, 1e-5, row)
    assert torch.equal(out.reshape(-1, shape[-1])[-1], row)


@pytest.mark.parametrize("hd", [1, 4, 20, 64])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 5), (3, 2), (2, 7)])
def test_attention_of_one_token_is_that_of_float64(kernels: Kernels, hd: int, kv_heads: int, group: int) -> None:
    for length in (1, 2, 15, 16, 33, 130):
        cache = torch.randn(2, kv_heads, length + 3, hd)
        keys, values = cache[:, :, :length]
        q = torch.randn(kv_heads * group, hd) * 4
        for window in (None, 1, 9):
            out = torch.empty_like(q)
            kernels.attend(q, keys, values, 0.3, window, out)
            low = max(0, length - window) if window else 0
            k, v = (each[:, low:].double().repeat_interleave(group, 0) for each in (keys, values))
            scores = (k @ q.double()[:, :, None])[..., 0] * 0.3
            want = (scores.softmax(-1)[:, None] @ v)[:, 0]
            assert (out - want).abs().max() < 1e-5, (length, window)


def test_scores_far_apart_and_not_a_number(numba: NumbaKernels) -> None:
    keys = torch.tensor([[[1.0], [-1.0], [0.5]]])
    out, values = torch.empty(1, 1), torch.tensor([[[3.0], [5.0], [7.0]]])
    numba.attend(torch.tensor([[1e4]]), keys, values, 1.0, None, out)
    assert out == 3.0
    numba.attend(torch.tensor([[float("nan")]]), keys, values, 1.0, None, out)
    assert out.isnan()


@pytest.mark.parametrize(("hd", "turned"), [(8, 8), (20, 12), (6, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_program_gives_the_bits_of_its_jobs(numba: NumbaKernels, hd: int, turned: int, interleaved: bool) -> None:
    heads, kv_heads, d, held = 6, 2, 37, np.array([4], np.int64)
    x, factors = torch.randn(1, d), torch.randn(d)
    weight, bias = torch.randn((heads + 2 * kv_heads) * hd, d), torch.randn(1, (heads + 2 * kv_heads) * hd)
    stored = weight.view(torch.uint8).view(len(weight), -1)
    keys, values = torch.randn(2, kv_heads, 9, hd)
    cos, sin = torch.randn(2, max(turned // 2, 1))

    normed, joint = torch.empty_like(x), torch.empty(1, len(weight))
    numba.norm(x, factors, 1e-6, normed)
    numba.linear(normed, stored, "F32", joint, 0)
    joint += bias
    q, k, v = (part[0].view(-1, hd) for part in joint.split([heads * hd, kv_heads * hd, kv_heads * hd], 1))
    if turned:
        rope = Rope.__new__(Rope)
        rope.head_dim, rope.rotary_dim = hd, turned
        q, k = (rope.apply(each[None], cos[None], sin[None], interleaved)[0] for each in (q, k))
    want_keys, want_values = keys.clone(), values.clone()
    want_keys[:, 4], want_values[:, 4] = k, v
    want, above = torch.empty(heads, hd), torch.empty(0)
    numba.attend(q.contiguous(), want_keys[:, :5], want_values[:, :5], 0.5, 3, want)
    above = (want.flatten() + bias[0, : want.numel()] > 0).nonzero()[:, 0].numpy()

    program, y, out = Program(numba.threads), torch.empty_like(x), torch.empty(heads, hd)
    row, ids, found = torch.empty_like(joint), np.zeros(out.numel() + 1, np.int64), np.zeros(1, np.int64)
    a, b, c = (part[0].view(-1, hd) for part in row.split([heads * hd, kv_heads * hd, kv_heads * hd], 1))
    program.norm(x, factors, 1e-6, y)
    program.linear(y, stored, "F32", row, 0)
    program.add(row, bias)
    program.rotate(a, b, c, keys, values, (cos, sin) if turned else None, interleaved, held)
    program.attend(a, keys, values, 0.5, 3, out, held)
    shift = bias[0, : out.numel()].contiguous()
    program.above_zero(out, shift, ids, found)
    numba.run(program)
    assert torch.equal(keys, want_keys) and torch.equal(values, want_values)
    assert torch.equal(out, want + shift.view_as(want))  # scores have their bias then
    assert ids[: found[0]].tolist() == above.tolist()
    held[0] = 5  # it reads its place anew
    numba.run(program)
    assert torch.equal(keys[:, 4], want_keys[:, 4]) and torch.equal(values[:, 5], want_values[:, 4])


def _steps(engine: Engine, plain: bool) -> torch.Tensor:
    if plain:
        engine.decoder.blocks = tuple(replace(block, one=None) for block in engine.decoder.blocks)
    session = engine.session()
    session.prefill([5, 9, 31, 7], more=True)
    out = [session.step(token, more=True).clone() for token in (7, 7, 50, 3)]
    out += list(session.verify([8, 9], more=True))
    session.trim(7)
    out += [session.step(token, more=token != 6).clone() for token in (8, 30, 6)]
    return torch.stack(out)


@pytest.mark.parametrize(
    ("family", "index"),
    [
        ("arcee", 0),
        ("arcee", 1),
        *((f, 0) for f in ("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen3_moe", "opt", "nemotron")),
    ],
)
@pytest.mark.parametrize("stream", ["never", "always"])
def test_one_token_gives_the_bits_of_its_plain_twin(tiny: Tiny, family: str, index: int, stream: str) -> None:
    folder, _ = tiny(family, index)
    found = []
    for plain in (True, False):
        with fc.load(folder, stream=stream, context=CONTEXT, kernels="compiled", threads=2) as engine:
            one = sum(block.one is not None for block in engine.decoder.blocks)
            assert one == (0 if family == "gemma2" else len(engine.decoder.blocks))
            found.append(_steps(engine, plain))
    assert torch.equal(*found)


def test_what_is_pinned_or_kept_elsewhere_later_is_found_there(tiny: Tiny) -> None:
    folder, _ = tiny("arcee", 0)
    with fc.load(folder, stream="always", context=CONTEXT, kernels="compiled", threads=2) as engine:
        want = _steps(engine, False)
        engine.decoder.keep([one for slices in engine.decoder.by_block for one in slices[:2]])
        assert torch.equal(_steps(engine, False), want)
        engine._kv = type(engine._kv)(engine.config, CONTEXT, "cpu")
        assert torch.equal(_steps(engine, False), want)
